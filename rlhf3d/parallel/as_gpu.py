"""CPU processes under the order, devices and rules of GPUs: for `rlhf3d rehearse --as-gpu`.

Invariant: the numbers are those of the CPU platform. As on GPUs are: one device per training rank,
which Ray counts and gives out in parts; what starts first; messages between devices and their rules
(`nccl_rules`); and a sleeping engine's weights, which are lost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlhf3d.parallel.platform import CPUPlatform


@dataclass(frozen=True)
class AsGPUPlatform(CPUPlatform):
    """CPU ranks that behave as GPUs' do."""

    dist_backend = "nccl_rules"
    resource = "GPU"
    one_device_a_rank = True
    measures_cache = True
    sleep_forgets = True

    def _bind_device(self) -> None:
        from rlhf3d.parallel import nccl_rules

        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        assert shown.isdigit(), f"Ray shows this rank the devices {shown!r}, not one"
        nccl_rules.register()

    def pretended_devices(self, needed: int) -> int | None:
        return needed
