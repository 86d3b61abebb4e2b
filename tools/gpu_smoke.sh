#!/usr/bin/env bash
# Ten minutes on a machine with one NVIDIA GPU: does the CUDA path work, how fast, how much memory against the plan?
#   bash tools/gpu_smoke.sh [FOLDER]     (in the environment of `make setup`; results in FOLDER)
set -euo pipefail
out=${1:-gpu_smoke}
mkdir -p "$out"
command -v nvidia-smi >/dev/null || { echo "no nvidia-smi here: this script needs an NVIDIA GPU" >&2; exit 2; }
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "torch sees no GPU: `rlhf3d doctor` says why" >&2; exit 2; }

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/gpu.csv"
rlhf3d doctor | tee "$out/doctor.txt"

model=models/SmolLM2-135M-Instruct
[ -f "$model/config.json" ] || python tools/make_smollm2.py --output "$model"
[ -f data/arithmetic/test.parquet ] || rlhf3d data prepare arithmetic --output data/arithmetic

# The quickstart on one GPU, shared by Megatron and vLLM: two precisions, the one that gives memory back, and engines in FP8 where the GPU has it.
one_gpu="actor.layout.pp=1 actor.layout.dp=1 cluster.platform=cuda cluster.gpus_per_node=1 trainer.total_training_steps=4
    trainer.save_optimizer=false validation.sampled_n=0 rollout.gpu_memory_utilization=0.3 data.train_batch_size=64
    actor.ppo_mini_batch_size=64 actor.ppo_micro_batch_size_per_gpu=16"
run() { # NAME OVERRIDES...
    local name=$1
    shift
    echo "== $name"
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 >"$out/$name.memory" &
    local sampler=$!
    # shellcheck disable=SC2086
    rlhf3d train configs/quickstart.yaml $one_gpu "trainer.output_dir=$out/$name" "$@" || {
        kill $sampler; echo "$name failed; its logs are in $out/$name/logs" >&2; exit 1; }
    kill $sampler
}
run float32
run bfloat16 model.dtype=bfloat16 rollout.dtype=bfloat16
run resting model.dtype=bfloat16 rollout.dtype=bfloat16 rollout.sleep=true model.offload=true
runs="float32 bfloat16 resting"
if python -c 'import torch, sys; sys.exit(torch.cuda.get_device_capability() < (8, 9))'; then
    run fp8 model.dtype=bfloat16 rollout.dtype=bfloat16 rollout.quantization=fp8_per_channel \
        algorithm.rollout_correction.rollout_is=token
    runs="$runs fp8"
fi
# shellcheck disable=SC2086
rlhf3d plan configs/quickstart.yaml $one_gpu model.dtype=bfloat16 rollout.dtype=bfloat16 --json >"$out/plan.json"
# shellcheck disable=SC2086
python tools/gpu_smoke_report.py "$out" $runs
