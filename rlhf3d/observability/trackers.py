"""Followers of a run's metrics and samples: TensorBoard, and what others may add.

Invariant: trackers are views. `metrics.jsonl` and `samples/` are the truth, written before any
tracker is called, and a tracker that fails is left out of the rest of the run, never a reason to
end it.
Runs in: driver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from rlhf3d.observability.samples import Kind, Sample

TENSORBOARD_DIR = "tensorboard"


class Tracker(Protocol):
    """A follower of a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step by name; NaN and infinity may be among them."""

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """Take the completions of a step, or of a validation."""

    def close(self) -> None:
        """Finish; nothing comes after it."""


class TensorBoard:
    """Curves in TensorBoard's format, in a folder of the run."""

    def __init__(self, output_dir: Path, resume_step: int | None) -> None:
        """`resume_step`: hide what a killed run wrote of later steps."""
        # Imported here: it pulls in torch, which reading a run's metrics does not need.
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint are written again: TensorBoard hides the first writing.
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(output_dir / TENSORBOARD_DIR), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        # By itself it writes every two minutes.
        self._writer.flush()

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """Nothing: it shows curves."""

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Trackers:
    """All trackers of a run, as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        # A copy, as a tracker that fails leaves the list.
        for tracker in list(self._trackers):
            self._call(tracker, partial(tracker.log, step, metrics))

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        for tracker in list(self._trackers):
            self._call(tracker, partial(tracker.samples, step, rows, kind))

    def close(self) -> None:
        """See `Tracker`."""
        for tracker in list(self._trackers):
            self._call(tracker, tracker.close)

    def _call(self, tracker: Tracker, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._trackers.remove(tracker)
            logging.getLogger(__name__).warning(
                "%s is left out of the rest of the run (%s: %s); "
                "metrics.jsonl and samples/ have everything",
                type(tracker).__name__,
                type(error).__name__,
                error,
            )
