"""vLLM's own CUDA code on ranks that each see one GPU, as Ray shows it.

Only the driver is faked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform, Platform
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_engine import VLLMEngine
from rlhf3d.rollout.vllm_patches import ask_driver_for_peers

P2P_OK, P2P_NOT_SUPPORTED = 0, 2


class Reached(Exception):
    """How far the all-reduce got."""


class NVMLError(Exception):
    """As pynvml's."""


def fake_nvml(status: int) -> Any:
    """The driver of a node with 8 GPUs, whatever a process is shown."""
    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_P2P_STATUS_OK=P2P_OK,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 8,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetP2PStatus=lambda one, other, asked: (
            status if asked == 0 else P2P_NOT_SUPPORTED
        ),
    )


def of_two(platform: Platform) -> EngineSettings:
    """An engine of two ranks."""
    rollout = RolloutConfig(dtype="bfloat16", tensor_parallel_size=2, enforce_eager=True)
    return EngineSettings("model", rollout, 1024, platform)


def start_engine(rank: int, port: int, status: int) -> str:
    """In a rank: our engine of two ranks, of which vLLM makes no more than its CustomAllreduce.

    How far that gets.
    """
    import vllm
    from vllm.distributed.device_communicators import custom_all_reduce
    from vllm.platforms.interface import DeviceCapability, Platform
    from vllm.utils import import_utils

    class OneGpu(Platform):
        device_control_env_var, device_name, device_type = "CUDA_VISIBLE_DEVICES", "cuda", "cuda"

        def is_cuda(self) -> bool:
            return True

        def is_cuda_alike(self) -> bool:
            return True

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def is_fully_connected(cls, ids: list[int]) -> bool:
            assert ids == [2, 3], "physical numbers"
            return True

    def buffers(*args: Any, **kwargs: Any) -> None:
        raise Reached("buffers")

    def make_llm(*args: Any, **kwargs: Any) -> None:
        made = custom_all_reduce.CustomAllreduce(dist.group.WORLD, torch.device("cuda:0"))
        raise Reached("disabled" if made.disabled else "ready")

    os.environ["CUDA_VISIBLE_DEVICES"] = str(2 + rank)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    custom_all_reduce.custom_ar, custom_all_reduce.current_platform = True, OneGpu()
    custom_all_reduce.ops = SimpleNamespace(meta_size=lambda: 0)
    custom_all_reduce.CustomAllreduce.create_shared_buffer = buffers
    import_utils.import_pynvml = lambda: fake_nvml(status)
    vllm.LLM = make_llm
    with pytest.raises(Reached) as reached:
        VLLMEngine(of_two(CUDAPlatform("test")), rank=rank).start(("127.0.0.1", port))
    return str(reached.value)


def start_both(status: int) -> list[str]:
    """In vLLM's process: both ranks of the engine, forked where vLLM is loaded."""
    import vllm.distributed.device_communicators.custom_all_reduce  # noqa: F401

    return run_ranks(2, start_engine, status)


def ask_another_all_reduce() -> None:
    """In vLLM's process: its all-reduce asks something else."""
    from vllm.distributed.device_communicators import custom_all_reduce

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom_all_reduce, "_can_p2p", lambda rank, world_size, group: True)
        ask_driver_for_peers()


def settings(rank: int, port: int, kind: str) -> list[Any]:
    """In a rank: what vLLM is told for an engine of two, what it makes of the head's dtype, where
    it can be found.
    """
    import vllm
    from vllm.config.model import _get_head_dtype

    told: dict[str, Any] = {}

    def make_llm(folder: str, **kwargs: Any) -> None:
        told.update(kwargs)
        raise Reached

    vllm.LLM = make_llm
    with pytest.raises(Reached):
        platform = CUDAPlatform("test") if kind == "cuda" else CPUPlatform("test")
        VLLMEngine(of_two(platform)).start(("10.0.0.1", port), host="10.0.0.2")
    config = told["hf_overrides"](SimpleNamespace(model_type="qwen2"))
    assert config.architectures == ["Qwen2ForCausalLM"]
    return [_get_head_dtype(config, torch.bfloat16, "generate"), os.environ["VLLM_HOST_IP"]]  # type: ignore[arg-type]


def settings_of_a_rank(kind: str) -> list[Any]:
    """In vLLM's process: in a process forked from it."""
    import vllm.config.model  # noqa: F401

    return run_ranks(1, settings, kind)[0]


@pytest.mark.parametrize("kind, head", [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_logits_are_float32_on_gpus_and_ranks_on_other_nodes_find_this_one(
    kind: str, head: torch.dtype, in_vllm_process: Callable[..., Any]
) -> None:
    assert in_vllm_process(settings_of_a_rank, kind) == [head, "10.0.0.2"]


def test_all_reduce_of_an_engine_whose_ranks_see_one_gpu_each(
    in_vllm_process: Callable[..., Any],
) -> None:
    assert in_vllm_process(start_both, P2P_OK) == ["buffers"] * 2
    assert in_vllm_process(start_both, P2P_NOT_SUPPORTED) == ["disabled"] * 2


def test_an_all_reduce_that_asks_something_else_is_refused(
    in_vllm_process: Callable[..., Any],
) -> None:
    with pytest.raises(AssertionError, match="no longer asks _can_p2p"):
        in_vllm_process(ask_another_all_reduce)
