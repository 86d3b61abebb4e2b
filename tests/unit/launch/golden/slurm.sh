#!/bin/bash
# math on 2 nodes; rendered by `rlhf3d launch slurm`.
#SBATCH --job-name=math
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=0-04:00:00
#SBATCH --partition=gpu
#SBATCH --chdir=/shared/rlhf3d
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

set -uo pipefail
# shellcheck disable=SC1091
source .venv/bin/activate
export RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export NCCL_DEBUG=WARN
# Who knows the token can run code on the nodes.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}

attempt=${SLURM_RESTART_COUNT:-0}
logs=$PWD/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID/attempt_$attempt
mkdir -p "$logs"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 10000))
echo "attempt $attempt on ${nodes[*]}, logs in $logs"

step=(srun --overlap --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1)
on_head=(--nodes=1 --ntasks=1 --nodelist="$head")
ray=(--block --disable-usage-stats --temp-dir="/tmp/ray-$SLURM_JOB_ID-$attempt")
ray+=(--num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus=4)
ray_head=
ray_workers=

end_ray() {
    trap '' USR1 TERM
    # shellcheck disable=SC2086
    kill $ray_workers $ray_head 2>/dev/null
    wait
}
trap end_ray EXIT

fail() {
    echo "$1; see $logs" >&2
    exit 1
}

head_ip=$("${step[@]}" "${on_head[@]}" python -c 'import ray; print(ray.util.get_node_ip_address())') ||
    fail "python cannot import ray on $head"
"${step[@]}" "${on_head[@]}" --output="$logs/ray-%N.log" \
    ray start --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false "${ray[@]}" &
ray_head=$!
deadline=$((SECONDS + 900))
until (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; do
    kill -0 "$ray_head" 2>/dev/null || fail "the head of Ray ended"
    ((SECONDS < deadline)) || fail "the head of Ray does not answer at $head_ip:$port after 900 s"
    sleep 1
done
"${step[@]}" --nodes=1 --ntasks=1 --exclude="$head" --output="$logs/ray-%N.log" \
    ray start --address="$head_ip:$port" "${ray[@]}" &
ray_workers=$!

# The run waits until all nodes are there (cluster.startup_timeout_s) and names those that are not.
"${step[@]}" "${on_head[@]}" --output="$logs/driver.log" \
    rlhf3d train configs/math.yaml cluster.platform=cuda cluster.num_nodes=2 cluster.gpus_per_node=4 cluster.ray_address="$head_ip:$port" &
driver=$!
trap 'kill -s USR1 "$driver"' USR1
trap : TERM # of this signal Slurm itself tells every step
wait "$driver"
status=$?
while kill -0 "$driver" 2>/dev/null; do # a forwarded signal ends `wait` before the driver
    wait "$driver"
    status=$?
done

echo "attempt $attempt ended with exit code $status"
if ((status == 75 && attempt < 20)); then
    end_ray
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
