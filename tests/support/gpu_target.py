"""Where the GPU suite runs: on GPUs, or, to try the suite itself, on CPU processes in their place.

Invariant: the parent process never starts CUDA, so that its ranks can be forked; a rank sees one
device, as in a run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.ranks import run_ranks

from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform, Platform


@dataclass(frozen=True)
class Target:
    """The devices."""

    platform: Platform
    devices: int

    @property
    def is_gpu(self) -> bool:
        return self.platform.kind == "cuda"

    def run(
        self, ranks: int, dtype: str, function: Callable[..., Any], *args: Any, shared: bool = False
    ) -> list[Any]:
        """Call `function(rank, port, *args)` on forked ranks, ready for Megatron.

        Each has a device, or all have the first.
        """
        return run_ranks(
            ranks, _on_device, self.platform, dtype, shared, function, args, timeout_s=280.0
        )


def _on_device(
    rank: int,
    port: int,
    platform: Platform,
    dtype: str,
    shared: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0" if shared else str(rank)
    os.environ.update(platform.environment("trainer", dtype))
    if platform.kind == "cpu":
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # Megatron would take its CUDA kernels
    platform.prepare_worker(1)
    return function(rank, port, *args)


def find_gpus() -> list[str]:
    """Names of the GPUs, as the driver's tool gives them: without CUDA in this process."""
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []


def used_mib() -> int:
    """Memory in use on the first GPU, all processes together."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def cpu_target() -> Target:
    """Processes of this machine."""
    return Target(CPUPlatform("GPU suite, tried on the CPU"), devices=2)


def gpu_target(gpus: list[str]) -> Target:
    """The GPUs that were found."""
    return Target(CUDAPlatform(f"GPU suite on {len(gpus)} x {gpus[0]}"), devices=len(gpus))
