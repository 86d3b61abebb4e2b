"""Profiled steps as a page draws them, with as many spans as it has room for.

Invariant: where there are too many spans, an engine's steps that follow each other are drawn as
one, then the shortest spans are left out; both are said. Only reads; a file that cannot be read is
named instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf3d.observability.profile.spans import RequestLife, Span
from rlhf3d.observability.profile.timeline import (
    NS_PER_US,
    TIMELINE_FILE,
    Lane,
    Timeline,
    folder_of,
    profiled_steps,
    read_timeline,
)
from rlhf3d.observability.profile.words import in_words

SPANS = 12_000
"""Of a page, over all runs and steps; some 30 bytes each."""
STEPS = 4
"""Profiled steps of a run that are shown, the last ones."""
LANES = 64
POINTS = 1_000
"""Of a page's width: gaps smaller than one are not seen."""
STEPS_OF_ENGINES = ("prefill", "decode")
JOINED = "An engine's steps of one kind that follow each other are drawn as one. "
REQUESTS = 1_500
"""Of an engine."""


@dataclass(frozen=True)
class Drawn:
    """A process: spans and requests as lists of numbers, times in µs."""

    name: str
    spans: Sequence[Sequence[int]]
    """Begin, duration, kind, label; in an order in which what is inside comes after."""
    requests: Sequence[Sequence[int | None]]
    """Row, submitted, first token, end, tokens; null where it did not come to that."""
    rows: int
    """Of requests at the same time."""
    error_us: float
    """Of its clock."""


@dataclass(frozen=True)
class Profile:
    """One step."""

    step: int
    end: int
    """µs."""
    words: Sequence[str]
    note: str
    """What is left out, and where all of it is."""
    lanes: Sequence[Drawn] = ()
    kinds: Sequence[str] = ()
    labels: Sequence[str] = ()
    """What spans are, once each."""


@dataclass
class _Table:
    """Texts by the number that stands for them."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def profiles(run: Path, runs: int = 1) -> list[Profile]:
    """The last profiled steps of a run; `runs`: how many share the page."""
    steps = profiled_steps(run)[-STEPS:]
    room = SPANS // max(1, len(steps)) // runs
    return [_profile(run, step, room) for step in steps]


def _profile(run: Path, step: int, room: int) -> Profile:
    try:
        timeline = read_timeline(run, step)
    except (ValueError, OSError) as error:
        return Profile(step, 0, (), f"The profile of step {step} is not shown: {error}")
    file = folder_of(run, step) / TIMELINE_FILE
    return drawn(timeline, room, str(file.relative_to(run)))


def drawn(timeline: Timeline, room: int, file: str) -> Profile:
    """A timeline with at most `room` spans."""
    shown = timeline.lanes[:LANES]
    joined = sum(len(lane.record.spans) for lane in shown) > room
    if joined:
        shown = tuple(_joined(lane, timeline.ended // POINTS) for lane in shown)
    shortest = _shortest(shown, room)
    kinds, labels, lanes = _Table(), _Table(), []
    for lane in shown:
        spans = [one for one in lane.record.spans if one.ended - one.began >= shortest]
        requests, rows = packed(lane.record.requests[:REQUESTS])
        flat = [_flat(one, kinds, labels) for one in spans]
        error_us = lane.offset.error_ns / NS_PER_US
        lanes.append(Drawn(lane.process.name, flat, requests, rows, error_us))
    return Profile(
        timeline.step,
        timeline.ended // NS_PER_US,
        in_words(timeline),
        f"{JOINED if joined else ''}{_left_out(timeline, shown, shortest)}"
        f"All of it is in {file}, which ui.perfetto.dev opens.",
        lanes,
        list(kinds.numbers),
        list(labels.numbers),
    )


def _joined(lane: Lane, gap: int) -> Lane:
    """With steps of one kind, at most `gap` from each other, as one."""
    spans: list[Span] = []
    steps = 0
    for one in lane.record.spans:
        last = spans[-1] if spans else None
        if (
            last is not None
            and one.kind == last.kind
            and one.kind in STEPS_OF_ENGINES
            and one.began - last.ended <= gap
        ):
            steps += 1
            spans[-1] = replace(last, ended=one.ended, details={"steps": steps})
        else:
            steps = 1
            spans.append(one)
    return replace(lane, record=replace(lane.record, spans=tuple(spans)))


def _spans(lanes: Sequence[Lane]) -> list[Span]:
    return list(chain.from_iterable(lane.record.spans for lane in lanes))


def _shortest(lanes: Sequence[Lane], room: int) -> int:
    """The duration from which on spans have room."""
    durations = [one.ended - one.began for one in _spans(lanes)]
    if len(durations) <= room:
        return 0
    # Of those that are equally short, none.
    return sorted(durations, reverse=True)[room] + 1


def _left_out(timeline: Timeline, shown: Sequence[Lane], shortest: int) -> str:
    parts = []
    if shortest:
        spans = _spans(shown)
        short = sum(one.ended - one.began < shortest for one in spans)
        parts.append(f"{short} of {len(spans)} spans, each under {shortest / NS_PER_US:.0f} µs")
    if more := len(timeline.lanes) - len(shown):
        parts.append(f"{more} more processes")
    cut = sum(max(0, len(lane.record.requests) - REQUESTS) for lane in shown)
    if cut:
        parts.append(f"{cut} more requests")
    return f"Left out: {', '.join(parts)}. " if parts else ""


def _flat(one: Span, kinds: _Table, labels: _Table) -> list[int]:
    label = labels.number(", ".join([one.name, *map(_detail, one.details.items())]))
    began = one.began // NS_PER_US
    return [began, one.ended // NS_PER_US - began, kinds.number(one.kind), label]


def _detail(item: tuple[str, Any]) -> str:
    name, value = item
    return f"{name.replace('_', ' ')} {value}"


def packed(requests: Sequence[RequestLife]) -> tuple[list[list[int | None]], int]:
    """Requests in as few rows as they need, those that come first above; and the number of rows."""
    free: list[int] = []
    found: list[list[int | None]] = []
    for one in sorted(requests, key=lambda one: (one.submitted, one.number)):
        end = one.ended
        row = next((row for row, at in enumerate(free) if at <= one.submitted), len(free))
        if row == len(free):
            free.append(0)
        free[row] = _FOREVER if end is None else end
        times = [None if at is None else at // NS_PER_US for at in (one.first_token, end)]
        found.append([row, one.submitted // NS_PER_US, *times, one.tokens])
    return found, len(free)


_FOREVER = 1 << 62
