"""What is replaced in vLLM, because each rank of an engine is a process that sees its own GPU alone.

Invariant: a replacement first checks that vLLM still asks what is replaced, and fails loudly where it does not.
"""

from __future__ import annotations

import inspect
from itertools import combinations

NVML_P2P_READ = 0
"""nvmlGpuP2PCapsIndex_t; pynvml's own constant of that name is a tuple by mistake."""


def meet_at(rank: int, address: str, port: int) -> None:
    """Have vLLM's external_launcher ranks meet at a given place.

    Its own way, by torchrun's environment, names shared memory alike for all engines of a host.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher as Launcher

    assert hasattr(Launcher, "_distributed_args"), (
        "vLLM's external launcher no longer asks _distributed_args"
    )
    # A rank sees only its own GPU, which then is number 0.
    Launcher._distributed_args = lambda self: (f"tcp://{address}:{port}", rank, 0)


def ask_driver_for_peers() -> None:
    """Have vLLM's all-reduce, whose ranks are on one node, ask NVML whether GPUs reach each other's memory.

    It asks CUDA, by the numbers of the engine's ranks, for devices that this process does not see.
    """
    from vllm.distributed.device_communicators import custom_all_reduce

    asked = getattr(custom_all_reduce, "_can_p2p", None)
    names = list(inspect.signature(asked).parameters) if asked else []
    assert names == ["rank", "world_size"], (
        f"vLLM's all-reduce no longer asks _can_p2p(rank, world_size): {names}"
    )
    custom_all_reduce._can_p2p = lambda rank, world_size: _gpus_reach_each_other()


def _gpus_reach_each_other() -> bool:
    """Whether every GPU of this node can read every other's memory."""
    from vllm.utils.import_utils import import_pynvml

    nvml = import_pynvml()
    nvml.nvmlInit()
    try:
        gpus = [
            nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())
        ]
        return all(
            nvml.nvmlDeviceGetP2PStatus(one, other, NVML_P2P_READ) == nvml.NVML_P2P_STATUS_OK
            for one, other in combinations(gpus, 2)
        )
    except nvml.NVMLError:  # where NVML cannot say: NCCL then does the all-reduce, and vLLM warns
        return False
    finally:
        nvml.nvmlShutdown()
