"""What a run measures: seconds per phase, and a row of metrics per step in `metrics.jsonl`.

Invariant: `metrics.jsonl` holds one strict JSON object per step, steps strictly rising, each on
disk before the next step begins; a value that is not finite is written as null and named under
`nonfinite`.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rlhf3d.observability.samples import Kind, Sample, write_samples
from rlhf3d.observability.tokens import TrajectoryTokens, write_tokens
from rlhf3d.observability.trackers.follow import Trackers
from rlhf3d.observability.whole_file import whole_file

METRICS_FILE = "metrics.jsonl"
TIMING = "timing_s/"
STEP_TIME = "timing_s/step"
KL_TO_REFERENCE = ("actor/reward_kl_penalty", "actor/kl_loss")
"""In the reward, else in the loss; an update without a reference has neither."""
Rows = Sequence[Mapping[str, Any]]
"""Of `metrics.jsonl`, in order."""
Points = Sequence[tuple[Mapping[str, Any], float]]
"""Rows and what was measured in them."""
Key = TypeVar("Key", str, tuple[str, str])


class PhaseTimer:
    """Wall-clock seconds of each phase of a step; a phase entered twice adds up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: str | None = None
        self._began = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body's seconds as `timing_s/<name>`.

        Phases follow one another; they do not nest.
        """
        assert self._running is None, f"phase {name!r} begins inside {self._running!r}"
        assert name != "step", "timing_s/step is the complete step, not a phase"
        self._running = name
        began = self._clock()
        try:
            yield
        finally:
            self._running = None
            key = TIMING + name
            self._seconds[key] = self._seconds.get(key, 0.0) + self._clock() - began

    def pop(self) -> dict[str, float]:
        """Return seconds by `timing_s/<phase>` since the last `pop`, and all as `timing_s/step`."""
        # From pop to pop, so that time between the phases is in the step too.
        now = self._clock()
        seconds = {**self._seconds, STEP_TIME: now - self._began}
        self._seconds, self._began = {}, now
        return seconds


class MetricsWriter:
    """Appends a row per step to `metrics.jsonl` and a file per step to `samples/`; trackers follow.

    `resume_step` is the last step that the resumed checkpoint holds: later rows, and a line torn by
    a kill, are dropped so that the file reads as one unbroken run. A new run leaves it None and
    wants a folder without rows (ValueError).
    """

    def __init__(
        self,
        output_dir: str | Path,
        resume_step: int | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self._folder = Path(output_dir)
        path = self._folder / METRICS_FILE
        self._folder.mkdir(parents=True, exist_ok=True)
        self.last_step = -1
        """The last step written; -1 before the first."""
        if path.exists():
            self.last_step = _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write all metrics of one step: numbers, numpy scalars or one-element tensors, by name."""
        assert step > self.last_step, f"step {step} written after step {self.last_step}"
        assert "step" not in metrics, "the step is its own argument"
        self.last_step = step
        values = {name: _number(value) for name, value in metrics.items()}
        nonfinite = sorted(name for name, value in values.items() if not math.isfinite(value))
        # Strict JSON has no NaN: later keys win, so that these become null.
        row: dict[str, Any] = {"step": step, **values, **dict.fromkeys(nonfinite)}
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        # With the system from here on: a kill of this process loses no row.
        self._file.flush()
        # After the file, which is the truth; trackers get NaN as it is.
        if self._trackers is not None:
            self._trackers.log(step, values)

    def samples(self, step: int, samples: Sequence[Sample], kind: Kind = "train") -> None:
        """Write (or, after a resume, replace) the completions of a step or of a validation."""
        write_samples(self._folder, step, samples, kind)
        if self._trackers is not None:
            self._trackers.samples(step, samples, kind)

    def tokens(self, step: int, trajectories: Sequence[TrajectoryTokens]) -> None:
        """Write (or, after a resume, replace) the tokens of a step's first trajectories."""
        write_tokens(self._folder, step, trajectories)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl`, in order; a last line still being written is left out.

    Raises ValueError when the folder has no such file or a line before the last is not JSON.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(
            f"{run_dir} holds no {METRICS_FILE}, so it is not the folder of a run: "
            "give the trainer.output_dir of a run that finished at least one step"
        )
    lines = path.read_bytes().splitlines(keepends=True)
    # Rows are written with their line end, so a line without one is not complete.
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not JSON with a step ({error}): restore or delete it"
            ) from error
        rows.append(row)
    return rows


def validation_accuracy(metrics: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Return held-out accuracies, in [0, 1], by (data source, measure).

    They stand under `val-core/<source>/acc/<measure>`.
    """
    return _held_out(metrics, "acc")


def validation_reward(metrics: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Held-out mean scores of a reward model, from `val-core/<source>/reward_model/<measure>`."""
    return _held_out(metrics, "reward_model")


def by_measure(
    rows: Rows, read: Callable[[Mapping[str, Any]], Mapping[tuple[str, str], float]]
) -> dict[tuple[str, str], Points]:
    """What `read`, one of the two above, finds in which rows, by data source and measure."""
    found: dict[tuple[str, str], list[tuple[Mapping[str, Any], float]]] = {}
    for row in rows:
        for key, value in read(row).items():
            found.setdefault(key, []).append((row, value))
    return dict(found)


def _held_out(metrics: Mapping[str, Any], what: str) -> dict[tuple[str, str], float]:
    found = {}
    for name, value in metrics.items():
        source, separator, measure = name.removeprefix("val-core/").rpartition(f"/{what}/")
        # A data source may have anything in its name, a measure has no slash.
        if name.startswith("val-core/") and separator and "/" not in measure and value is not None:
            found[source, measure] = float(value)
    return found


def phase_seconds(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by phase name, from `timing_s/<phase>`; the complete step is not among them."""
    return {
        name.removeprefix(TIMING): float(value)
        for name, value in metrics.items()
        if name.startswith(TIMING) and name != STEP_TIME and value is not None
    }


def phase_totals(rows: Rows) -> Counter[str]:
    """Seconds by phase name, of all rows together."""
    totals: Counter[str] = Counter()
    for row in rows:
        totals.update(phase_seconds(row))
    return totals


def keys_of(mappings: Iterable[Mapping[Key, float]]) -> list[Key]:
    """Return all keys, in the order in which they first appear."""
    keys: dict[Key, None] = {}
    for mapping in mappings:
        keys |= dict.fromkeys(mapping)
    return list(keys)


def _number(value: Any) -> int | float:
    # Integers stay exact; numpy scalars and one-element tensors have __float__.
    return int(value) if isinstance(value, int) else float(value)


def _truncate(path: Path, resume_step: int | None) -> int:
    """Keep the rows up to `resume_step` (replacing the file in one rename).

    Returns the last step kept.
    """
    rows = read_metrics(path.parent)
    if resume_step is None and rows:
        raise ValueError(
            f"trainer.output_dir={path.parent} already holds {len(rows)} steps of another run: "
            "resume that run, or choose another folder"
        )
    kept = [row for row in rows if resume_step is not None and row["step"] <= resume_step]
    # Renamed over the old file: a kill leaves the one or the other, complete.
    with whole_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
    return int(kept[-1]["step"]) if kept else -1
