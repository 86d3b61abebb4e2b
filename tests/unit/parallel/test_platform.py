"""Choice of platform, and what can be asked of one without torch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf3d import machine
from rlhf3d.config.load import ConfigError
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config
from rlhf3d.parallel import platform
from rlhf3d.parallel.as_gpu import AsGPUPlatform
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform, choose_platform


def test_importing_and_choosing_cpu_loads_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; from rlhf3d.parallel.platform import choose_platform as c; p = c('cpu');"
        "p.memory_gib(), p.resource, p.transformer_config_overrides();"
        "assert not {'torch', 'megatron', 'ray'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(platform.__file__).parents[2], timeout=60
    )


def test_auto_falls_back_to_cpu_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    chosen = choose_platform("auto")
    assert (chosen.kind, chosen.dist_backend, chosen.resource) == ("cpu", "gloo", "CPU")
    assert "cluster.platform=auto" in chosen.reason and "torch" in chosen.reason


def test_cuda_without_a_gpu_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"cluster\.platform=cuda, but .* set cluster\.platform=cpu"
    ):
        choose_platform("cuda")


def test_unknown_platform_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"cluster\.platform='tpu' is not one of auto, cpu, cuda, as_gpu"
    ):
        choose_platform("tpu")


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_gpu_is_chosen_where_there_is_one(requested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H100")
    chosen = choose_platform(requested)
    assert (chosen.kind, chosen.dist_backend, chosen.resource) == ("cuda", "nccl", "GPU")
    assert chosen.reason.endswith("found 8 x H100")


def test_a_cuda_worker_settles_on_one_cudnn_before_megatron_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(platform.os, "environ", {})
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(platform, "use_torchs_cudnn", lambda: done.append("cudnn"))
    monkeypatch.setattr(
        platform.megatron_patches, "apply", lambda kind: done.append(f"patches for {kind}")
    )
    CUDAPlatform("test").prepare_worker(threads=1)
    assert done == ["cudnn", "cuda:0", "patches for cuda"]


IDLE = """
import os, sys, time
from rlhf3d.parallel.platform import CPUPlatform
if sys.argv[1] == "ours":
    os.environ.update(CPUPlatform("test").thread_settings(2))
import torch
torch.set_num_threads(2)
numbers, idle_s = torch.ones(1 << 20), 0.0
for _ in range(20):
    numbers.add_(1.0)
    began = time.process_time()
    time.sleep(0.02)
    idle_s += time.process_time() - began
print(idle_s)
"""


@pytest.mark.skipif(machine.cores() < 2, reason="on one core OpenMP's threads do not wait so long")
def test_threads_that_wait_for_work_leave_the_core_to_others() -> None:
    """By themselves they look for it in a loop, after every operation."""
    waiting = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in waiting}

    def idle_s(whose: str) -> float:
        command = [sys.executable, "-c", IDLE, whose]
        found = subprocess.run(
            command,
            check=True,
            cwd=Path(platform.__file__).parents[2],
            env=environment,
            capture_output=True,
            timeout=60,
        )
        return float(found.stdout)

    ours = min(idle_s("ours") for _ in range(3))
    assert ours < 0.02 < max(idle_s("torch's") for _ in range(3))


def test_the_users_own_way_of_waiting_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    cpu, cuda = CPUPlatform("test"), CUDAPlatform("test")
    assert cpu.thread_settings(3).keys() == {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"}
    assert cuda.thread_settings(3) == {"OMP_NUM_THREADS": "3"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert cpu.thread_settings(3) == {"OMP_NUM_THREADS": "3"}


def test_cpu_turns_every_fusion_off_and_cuda_the_same_ones_on() -> None:
    cpu, cuda = (p("test").transformer_config_overrides() for p in (CPUPlatform, CUDAPlatform))
    assert cpu.pop("use_cpu_initialization") and not cuda.pop("use_cpu_initialization")
    assert cpu.keys() == cuda.keys() and not any(cpu.values()) and all(cuda.values())
    assert {"gradient_accumulation_fusion", "moe_permute_fusion", "apply_rope_fusion"} < cuda.keys()


def test_memory_is_the_smallest_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = CPUPlatform("test").memory_gib()
    limit, unlimited = tmp_path / "limit", tmp_path / "unlimited"
    limit.write_text(f"{1 << 29}\n")
    unlimited.write_text("max\n")
    files = [(str(path), "unused") for path in (unlimited, limit, tmp_path / "absent")]
    monkeypatch.setattr(machine, "_CGROUP_FILES", files)
    assert CPUPlatform("test").memory_gib() == 0.5 < whole


def test_cuda_layers_need_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"cluster\.platform=cuda needs Transformer Engine"):
        CUDAPlatform("test").layer_spec(qk_layernorm=False)


def test_cuda_multiplies_experts_as_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = SimpleNamespace(get_gpt_layer_with_transformer_engine_spec=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "megatron.core.models.gpt.gpt_layer_specs", specs)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    dense, sparse = (CUDAPlatform("test").layer_spec(True, experts) for experts in (0, 8))
    assert dense == {"num_experts": None, "moe_grouped_gemm": False, "qk_layernorm": True}
    assert sparse == {"num_experts": 8, "moe_grouped_gemm": True, "qk_layernorm": True}


def test_platforms_travel_to_workers() -> None:
    for chosen in (CPUPlatform("why"), CUDAPlatform("why")):
        assert pickle.loads(pickle.dumps(chosen)) == chosen


def test_auto_dtype_follows_the_hardware() -> None:
    config = resolve_platform(Config(), CUDAPlatform(reason="test"))
    assert (
        config.model.dtype == config.rollout.dtype == "bfloat16"
        and config.cluster.platform == "cuda"
    )
    assert CPUPlatform(reason="test").fast_dtype in ("bfloat16", "float32")
    assert config.rollout.enforce_eager is False
    assert resolve_platform(Config(), CPUPlatform(reason="test")).rollout.enforce_eager is True
    explicit = replace(Config(), model=replace(Config().model, dtype="float32"))
    resolved = resolve_platform(explicit, CUDAPlatform(reason="test"))
    assert (resolved.model.dtype, resolved.rollout.dtype) == ("float32", "bfloat16")


def test_what_was_asked_for_and_the_platform_has_not_is_refused() -> None:
    config = replace(Config(), model=replace(Config().model, share_prefixes=True))
    assert resolve_platform(config, CPUPlatform("test")).model.share_prefixes is True
    with pytest.raises(ConfigError, match=r"model\.share_prefixes = true .*platform = cuda"):
        resolve_platform(config, CUDAPlatform("test"))


@pytest.mark.parametrize("shown", ["", "0,1"])
def test_a_rank_as_on_gpus_has_one_device(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with pytest.raises(AssertionError, match="not one"):
        AsGPUPlatform("test")._bind_device()


def test_processes_on_gpus_start_with_what_cuda_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv(
        "PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512, expandable_segments:False"
    )
    cuda = CUDAPlatform("test")
    exact = {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}
    for process in ("trainer", "engine"):
        found = cuda.environment(process, "float32")  # type: ignore[arg-type]
        assert found.items() >= exact.items()
        assert not cuda.environment(process, "bfloat16").keys() & exact.keys()  # type: ignore[arg-type]
        assert ("CUDA_DEVICE_MAX_CONNECTIONS" in found) == (process == "trainer")
        assert found["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512,expandable_segments:False"
    assert CPUPlatform("test").environment("trainer", "float32") == {}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_cannot_be_shared_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512,expandable_segments:True")
    with pytest.raises(ValueError, match="remove expandable_segments:True"):
        CUDAPlatform("test").environment("engine", "bfloat16")
