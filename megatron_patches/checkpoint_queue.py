"""Patch `checkpoint_queue`: a save hands its results over in the process.

Invariant: no process is started for the results of a save. Upstream's spawned manager imports the
main module, and with it torch and Megatron, once a rank: seconds to half a minute for the first
save. Only writers in processes of their own need it; rlhf3d writes in a thread of the rank
(`rlhf3d/checkpoints/sharded.py`).
Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

import queue

from megatron_patches.patch import Patch, Target

_MODULE = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def _apply() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Upstream starts its manager only where this is None.
    filesystem_async._results_queue = queue.Queue()


PATCH = Patch(
    name="checkpoint_queue",
    versions=">=0.16,<0.20",
    reason="the first save spawns one Python process a rank just for a queue",
    targets=(
        Target(_MODULE, "if _results_queue is None:"),
        Target(
            f"{_MODULE}:FileSystemWriterAsync.retrieve_write_results",
            "self.results_queue.get_nowait()",
        ),
    ),
    apply=_apply,
    cpu_only=False,
)
