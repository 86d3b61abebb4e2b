"""A training rank on the CPU: the one place where tests start one and make an `EngineContext`.

Invariant: nothing heavy is imported with this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf3d.config.schema import LayoutConfig
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform, Platform

if TYPE_CHECKING:
    from rlhf3d.engine.megatron_engine import EngineContext

CPU = CPUPlatform("test")


def import_engine() -> None:
    """Import Megatron with its patches and what ranks use, so that forked ranks need not."""
    import megatron_patches

    torch.set_num_threads(1)  # a forked rank must not wait for threads that only its parent has
    megatron_patches.apply("cpu")
    import rlhf3d.checkpoints.sharded
    import rlhf3d.engine.megatron_engine
    import rlhf3d.parallel.megatron_init
    import rlhf3d.parallel.pipeline  # noqa: F401


def join(
    rank: int,
    port: int,
    folder: Path,
    layout: ParallelLayout,
    layout_config: LayoutConfig | None = None,
    platform: Platform = CPU,
    spec: ModelSpec | None = None,
    **settings: Any,
) -> EngineContext:
    """Start one rank of a world; what its engines share, float32 and all else plain unless set."""
    from rlhf3d.engine.megatron_engine import EngineContext
    from rlhf3d.parallel.megatron_init import initialize_megatron

    torch.set_num_threads(1)
    initialize_megatron(layout, rank, 0, platform, timeout_s=60, master_port=port)
    context = {
        "spec": spec or load_spec(folder),
        "layout": layout,
        "layout_config": layout_config or LayoutConfig(layout.tp, layout.pp, layout.dp),
        "rank": rank,
        "platform": platform,
        "dtype": "float32",
        "device": platform.device(),
        "temperature": 1.0,
        "total_steps": 10,
    }
    return EngineContext(**(context | settings))
