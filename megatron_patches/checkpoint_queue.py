"""Patch `checkpoint_queue`: a save hands its results over in the process.

Invariant: no process is started for the results of a save. Upstream's spawned manager imports the
main module, and with it torch and Megatron, once a rank: seconds to half a minute for the first
save. Only writers in processes of their own need it; rlhf3d writes in a thread of the rank
(`rlhf3d/checkpoints/sharded.py`).
Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

import queue
from types import ModuleType

from megatron_patches.patch import Patch, Target, after_import

_MODULE = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def _apply() -> None:
    # Not before a save imports it: its libraries take as long to import as torch.
    after_import(_MODULE, _own_queue)


def _own_queue(module: ModuleType) -> None:
    # Upstream starts its manager only where this is None.
    module._results_queue = queue.Queue()  # type: ignore[attr-defined]


PATCH = Patch(
    name="checkpoint_queue",
    versions=">=0.16,<0.20",
    reason="the first save spawns one Python process a rank just for a queue",
    targets=(
        Target(_MODULE, "if _results_queue is None:"),
        Target(_MODULE, "self.results_queue.get_nowait()"),
    ),
    apply=_apply,
    cpu_only=False,
)
