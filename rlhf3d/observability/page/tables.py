"""What a page says of a run in tables and lines: times, memory, comparison, summary, excerpts.

Invariant: measured and planned stand in one line only where they are of the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rlhf3d.observability.metrics import STEP_TIME
from rlhf3d.observability.page.answers import LOWEST, REWARDED, Answer, Group, shortened
from rlhf3d.observability.page.bound import occasional, recent_phases, step_seconds
from rlhf3d.observability.page.collect import RunView
from rlhf3d.observability.page.learning import held_out, reward_name
from rlhf3d.observability.page.trends import (
    change,
    mean_of,
    recent,
    training_rows,
    values,
    window,
)

COMPARED = ("reward", "held-out", "length, tokens", "step, s", "tokens/s per device")
"""What runs are compared by: first and last steps, first and last validation, the last steps."""
MEMORY = ("perf/rank_memory_gib", "perf/host_memory_gib")


@dataclass(frozen=True)
class PhaseRow:
    """Seconds of a phase in a step."""

    name: str
    measured: float | None
    planned: float | None = None
    share: float | None = None
    """Of a step, measured."""
    alike: bool = True
    """Whether measured and planned are of the same thing."""


def phase_table(run: RunView) -> list[PhaseRow]:
    """Measured and planned seconds of the phases of a step; sums; what is not in a usual step."""
    measured, step_s = recent_phases(run.rows), step_seconds(run.rows)
    if not step_s:
        return []
    plan = run.facts.plan
    planned = dict({} if plan is None else plan.phases)
    last = recent(training_rows(run.rows))
    drawn = mean_of(last, "async/drawn_s")
    besides = []
    if drawn is not None:
        # Planned is generation that has the machine for itself, and that a step waits for.
        alone = planned.pop("generate", None)
        besides.append(PhaseRow("generate, beside training", drawn, alone, alike=False))
    for phase, one in occasional(run.rows).items():
        besides.append(PhaseRow(f"{phase}, {one.times_text}", one.each_s, planned.pop(phase, None)))
    rows = [
        PhaseRow(name, seconds, planned.get(name), seconds / step_s)
        for name, seconds in sorted(measured.items(), key=lambda item: -item[1])
    ]
    rows += [PhaseRow(name, None, planned[name]) for name in planned if name not in measured]
    both = [name for name in planned if measured.get(name)]
    if both:
        ours = sum(measured[name] for name in both)
        theirs = sum(planned[name] for name in both)
        rows.append(PhaseRow("those with a plan, together", ours, theirs, ours / step_s))
    return [*rows, PhaseRow("complete step", step_s, None, 1.0), *besides]


@dataclass(frozen=True)
class MemoryRow:
    """GiB of processes with the same needs, or of a host."""

    place: str
    phase: str
    planned: float | None
    measured: float | None


def memory_table(run: RunView) -> list[MemoryRow]:
    """Planned memory beside measured: that of the fullest rank, and of the driver's host."""
    plan = run.facts.plan
    rank, host = (max(values(run.rows, name), default=None) for name in MEMORY)
    places = () if plan is None else plan.memory
    fullest = max((place.gib for place in places), default=None)
    rows = []
    for place in places:
        rows.append(MemoryRow(place.place, place.phase, place.gib, None))
    if rank is not None:
        # Which rank that is nobody has written down.
        rows.append(MemoryRow("fullest training rank", "", fullest, rank))
    if plan is not None or host is not None:
        planned = None if plan is None else plan.host_gib
        rows.append(MemoryRow("host", "", planned, host))
    return rows


def summary(run: RunView) -> dict[str, Any]:
    """A run in a line or two, and over how many steps its means are."""
    first, last = run.rows[0]["step"], run.rows[-1]["step"]
    record = run.facts.record
    of = "" if record is None else f" of {record.total_steps}"
    line = f"Steps {first} to {last}{of} in {in_words(sum(values(run.rows, STEP_TIME)))}"
    resumes = run.facts.resumes
    if resumes:
        times = "once" if len(resumes) == 1 else f"{len(resumes)} times"
        line += f", resumed {times}"
    elif run.facts.starts:
        line += ", never resumed"
    setup = run.facts.setup
    about, scoring = ("", "") if setup is None else (f"{setup.about}.", setup.scoring)
    return {
        "line": f"{line}; {record}." if record and record.end else f"{line}.",
        "about": about,
        "scoring": scoring,
        "resumed": bool(resumes),
        "window": window(len(training_rows(run.rows))),
        "memory_missing": not any(values(run.rows, name) for name in MEMORY),
    }


def in_words(seconds: float) -> str:
    """A time as one says it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


EXCERPT = 160
"""Characters of a text in a card."""


@dataclass(frozen=True)
class Excerpt:
    """One answer in a card."""

    about: str
    prompt: str
    text: str


def excerpts(run: RunView) -> list[Excerpt]:
    """A held-out prompt before and after, and an answer of the lowest score.

    Of the prompts the first that turned right, which is said; else the first.
    """
    found = []
    learned = [pair for pair in run.pairs if _turned_right(pair)]
    for pair in (learned or run.pairs)[:1]:
        before, after = run.pair_steps
        of = f"the first of {len(learned)} in {len(run.pairs)} prompts that turned right, "
        where = f"{of if learned else ''}step {before}"
        found.append(_excerpt(where, pair, pair.answers[0]))
        last = _excerpt(f"the same, step {after}", pair, pair.answers[1])
        found.append(replace(last, prompt=""))
    for at in run.groups[-1:]:
        lowest = [pick for pick in at.picks if pick.title == LOWEST]
        for pick in lowest:
            group = pick.groups[0]
            found.append(_excerpt(f"one of the lowest of step {at.step}", group, group.answers[0]))
    return found


def _turned_right(pair: Group) -> bool:
    before, after = pair.answers
    return before.worth < REWARDED <= after.worth


def _excerpt(where: str, group: Group, answer: Answer) -> Excerpt:
    texts = []
    for text in (group.prompt, answer.text):
        start, left_out = shortened(text, EXCERPT)
        texts.append(f"{start} …" if left_out else start)
    cut = ", cut off" if answer.cut_off else ""
    return Excerpt(f"{where}, score {answer.mark}{cut}", *texts)


def compared(run: RunView) -> list[str]:
    """A run's cells of `COMPARED`."""
    steps = training_rows(run.rows)
    accuracy, last = held_out(run.rows), recent(steps)
    found = change(steps, reward_name(steps))
    cells = ["–" if found is None else f"{found.first.value:.3g} → {found.last}"]
    if accuracy is None:
        cells.append("–")
    else:
        first, end = accuracy.points[0][1], accuracy.points[-1][1]
        cells.append(f"{accuracy.text(first)} → {accuracy.text(end)}")
    for name in ("response_length/mean", STEP_TIME, "perf/throughput"):
        mean = mean_of(last, name)
        cells.append("–" if mean is None else f"{mean:,.1f}")
    return cells
