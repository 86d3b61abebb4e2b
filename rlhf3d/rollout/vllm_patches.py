"""What is replaced in vLLM, because each rank of an engine is a process that sees only its own GPU.

Invariant: a replacement first checks that vLLM still asks for what is replaced, and fails where it
does not.
"""

from __future__ import annotations

import inspect
from itertools import combinations
from typing import Any

NVML_P2P_READ = 0
"""nvmlGpuP2PCapsIndex_t; pynvml's own constant of that name is a tuple by mistake."""


def meet_at(rank: int, address: str, port: int) -> None:
    """Have vLLM's external_launcher ranks meet at a given address.

    By torchrun's environment, its own way, all engines of a host would use the same names for
    shared memory.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher as Launcher

    assert hasattr(Launcher, "_distributed_args"), (
        "vLLM's external launcher no longer asks _distributed_args"
    )

    def distributed_args(self: Any) -> tuple[str, int, int]:
        # A rank sees only its own GPU, which then is number 0.
        return f"tcp://{address}:{port}", rank, 0

    Launcher._distributed_args = distributed_args


def ask_driver_for_peers() -> None:
    """Have vLLM's all-reduce ask NVML whether a node's GPUs reach each other's memory.

    Its ranks are on one node. It would ask CUDA, by the numbers of the engine's ranks, about
    devices that this process does not see.
    """
    from vllm.distributed.device_communicators import custom_all_reduce

    asked = getattr(custom_all_reduce, "_can_p2p", None)
    names = list(inspect.signature(asked).parameters) if asked else []
    assert names == ["rank", "world_size"], (
        f"vLLM's all-reduce no longer asks _can_p2p(rank, world_size): {names}"
    )

    def can_p2p(rank: int, world_size: int) -> bool:
        # About all GPUs of the node: which ones the engine's other ranks have is unknown here.
        return _gpus_reach_each_other()

    custom_all_reduce._can_p2p = can_p2p


def _gpus_reach_each_other() -> bool:
    """Whether every GPU of this node can read every other's memory."""
    from vllm.utils.import_utils import import_pynvml

    nvml = import_pynvml()
    nvml.nvmlInit()
    try:
        # NVML counts all GPUs, whatever CUDA_VISIBLE_DEVICES shows to this process.
        gpus = [
            nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())
        ]
        return all(
            nvml.nvmlDeviceGetP2PStatus(one, other, NVML_P2P_READ) == nvml.NVML_P2P_STATUS_OK
            for one, other in combinations(gpus, 2)
        )
    except nvml.NVMLError:
        return False  # unknown: NCCL then does the all-reduce, and vLLM warns
    finally:
        nvml.nvmlShutdown()
