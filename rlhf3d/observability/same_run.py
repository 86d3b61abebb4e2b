"""Whether two runs are the same to the bit, by what they wrote.

Invariant: everything in samples and metrics counts, except times and what follows from them.
Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf3d.observability.metrics import TIMING, read_metrics
from rlhf3d.observability.samples import KINDS, printable, read_samples, samples_path
from rlhf3d.observability.tokens import read_tokens, tokens_path

# Of seconds, of what one of the two may not have done, saving, and of the machine.
_OF_TIME = (
    "perf/time_per_step",
    "perf/throughput",
    "perf/rank_memory_gib",
    "perf/host_memory_gib",
    "checkpoint/bytes",
)
_ALL_OF_TIME = (TIMING, "async/")
_SHOWN = 60


def is_time(name: str) -> bool:
    """Whether a metric says how long something took, or follows from that."""
    parts = name.split("/")
    if name.startswith(_ALL_OF_TIME) or name in _OF_TIME:
        return True
    return any(part.endswith("_s") for part in parts)


def first_difference(run: Path, again: Path, after_step: int, last_step: int) -> str | None:
    """The first difference in the steps `after_step` + 1 to `last_step`; None where there is none.

    Step 0 is the validation before the training. Raises ValueError where a folder is no run's.
    """
    first = after_step + 1 if after_step else 0
    rows = {row["step"]: row for row in read_metrics(run)}
    rows_again = {row["step"]: row for row in read_metrics(again)}
    for step in range(first, last_step + 1):
        found = next(_of_samples(run, again, step), None)
        # Of a step that a kill cut off, or without validation, there is no row.
        if found is None and step in rows:
            found = _of_rows(rows[step], rows_again.get(step, {}))
        if found is not None:
            return f"step {step}: {found}"
    return None


def _of_samples(run: Path, again: Path, step: int) -> Iterator[str]:
    """Of trajectories' tokens, where they were kept, and of samples."""
    kept, kept_again = tokens_path(run, step), tokens_path(again, step)
    if kept.is_file() and kept_again.is_file():
        pairs = zip(read_tokens(kept), read_tokens(kept_again), strict=False)
        for number, (was, now) in enumerate(pairs):
            yield from _differences(asdict(was), asdict(now), f"tokens of trajectory {number}")
    for kind in KINDS:
        path, other = samples_path(run, step, kind), samples_path(again, step, kind)
        if not path.is_file():
            continue
        if not other.is_file():
            yield f"{other.name} is missing"
            continue
        samples, samples_again = read_samples(path), read_samples(other)
        for number, (old, new) in enumerate(zip(samples, samples_again, strict=False)):
            yield from _differences(asdict(old), asdict(new), f"{path.name} sample {number}")
        if len(samples) != len(samples_again):
            yield f"{path.name} has {len(samples)} samples, now {len(samples_again)}"


def _of_rows(row: Mapping[str, Any], again: Mapping[str, Any]) -> str | None:
    for name in [*row, *again]:
        if not is_time(name) and row.get(name) != again.get(name):
            return f"{name} was {row.get(name, 'missing')}, now {again.get(name, 'missing')}"
    return None


def _differences(was: Any, now: Any, where: str) -> Iterator[str]:
    """Where two values made of mappings, lists and numbers differ, deepest first."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*was, *now]):
            yield from _differences(was.get(key), now.get(key), f"{where}, {key}")
    elif _is_list(was) and _is_list(now) and len(was) == len(now):
        for place, (old, new) in enumerate(zip(was, now, strict=True)):
            yield from _differences(old, new, f"{where} {place}")
    elif was != now:
        yield f"{where}: was {printable(repr(was), _SHOWN)}, now {printable(repr(now), _SHOWN)}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
