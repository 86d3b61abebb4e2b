"""What a tracker is, and what it is given of a run.

Invariant: trackers are views. `metrics.jsonl` and `samples/` are the truth, and are written first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.observability.whole_file import whole_file

TRACKERS_DIR = "trackers"


class Tracker(Protocol):
    """A follower of a run; all its calls, the one that makes it included, are of one thread."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step by name; NaN and infinity may be among them."""

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """Take the first completions of a step, or of a validation."""

    def close(self) -> None:
        """Finish; nothing comes after it."""


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run when it is made."""

    folder: Path
    """The run's own."""
    project: str = "rlhf3d"
    name: str = "run"
    config: Mapping[str, Any] = field(default_factory=dict)
    """Every key of the configuration, by dotted name."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of this package (with a digest of its source) and of those it computes with."""
    resume_step: int | None = None
    """The step of the checkpoint that the run continues from; None for a new one."""

    def local(self, tracker: str) -> Path:
        """The folder of a tracker that keeps its records with the run, made if need be."""
        path = self.folder / TRACKERS_DIR / tracker
        path.mkdir(parents=True, exist_ok=True)
        return path

    def known_id(self, tracker: str) -> str | None:
        """The tracker's own name of this run, where it continues in its folder."""
        path = self._id_file(tracker)
        # A run that begins again in a folder without steps is another run.
        if self.resume_step is None or not path.is_file():
            return None
        return path.read_text(encoding="utf-8").strip()

    def keep_id(self, tracker: str, name: str) -> None:
        """Write the tracker's name of this run down for the next resume."""
        with whole_file(self._id_file(tracker)) as file:
            file.write(f"{name}\n")

    def _id_file(self, tracker: str) -> Path:
        return self.folder / TRACKERS_DIR / f"{tracker}.id"


COLUMNS = (
    "step",
    "prompt",
    "response",
    "answer",
    "ground_truth",
    "score",
    "outcome",
    "length",
    "version",
)


def table_rows(step: int, rows: Sequence[Sample]) -> list[list[Any]]:
    """Completions as the rows of a table with `COLUMNS`."""
    return [
        [
            step,
            row.prompt,
            row.transcript,
            row.answer or "",
            row.ground_truth,
            row.score,
            row.outcome,
            row.length,
            row.policy_version,
        ]
        for row in rows
    ]


class TableRun:
    """A tracker of a library whose run has wandb's `log` and `finish`, and that has its `Table`."""

    def __init__(self, run: Any, table: Any) -> None:
        self._run, self._table = run, table

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        table = self._table(columns=list(COLUMNS), data=table_rows(step, rows))
        self._run.log({f"samples/{kind}": table}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
