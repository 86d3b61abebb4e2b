"""Patch `checkpoint_writer`: a rank writes its checkpoint files itself.

Invariant: no process is forked while gloo's threads run; a child that inherits their locks can hang
the save for ever. megatron-core 0.17 replaced the forked writers by threads.
"""

from __future__ import annotations

import queue
from typing import Any

from megatron_patches.patch import Patch, Target

_CLASS = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync"


def _apply() -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
        written: queue.Queue[tuple[int, Any]] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        for index, bucket in enumerate(buckets):
            # write_preloaded_data takes one entry off this queue for each bucket.
            pending.put(index)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, written, pending, use_fsync=True, use_msc=use_msc
            )
        outcomes = dict(written.get_nowait() for _ in buckets)
        failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
        results.put(failures[0] if failures else outcomes)

    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(write)


PATCH = Patch(
    name="checkpoint_writer",
    versions=">=0.16,<0.17",
    reason="a save forks writers from a process with gloo threads, and waits without a deadline",
    targets=(
        Target(f"{_CLASS}.write_preloaded_data_multiproc", 'mp.get_context("fork")'),
        Target(f"{_CLASS}.write_preloaded_data", "results_queue.put(local_output)"),
    ),
    apply=_apply,
    cpu_only=False,
)
