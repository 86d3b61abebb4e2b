"""Where a profiled step lost time: shares, and in words.

Invariant: every figure follows from the spans alone. A stage waits where its part of the pipeline's
schedule is neither a pass nor a collective; what a pass waits for inside itself (its tensor ranks)
counts as work. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from statistics import fmean

from rlhf3d.observability.profile.intervals import Interval, common, length, union, without
from rlhf3d.observability.profile.spans import Kind, RequestLife, Span
from rlhf3d.observability.profile.timeline import Lane, Process, Timeline
from rlhf3d.units import NS

WORK: tuple[Kind, ...] = ("forward", "backward", "optimizer", "transfer", "prefill", "decode")
COMPUTE: tuple[Kind, ...] = ("forward", "backward", "optimizer")
FEW = 4
"""An engine has few requests where it has less than one in so many of its most."""
NAMED = 0.02
"""Share of the step from which something is worth naming."""
EACH = 4
"""So many stages or engines are told one by one."""
UNEQUAL = 0.1
"""Share of a pass that stages wait beyond the schedule's own bubble before it is said."""


@dataclass(frozen=True)
class StageShares:
    """The calls of one phase on one pipeline stage; shares of their time, means over its ranks."""

    phase: str
    process: Process
    """One of the stage's."""
    seconds: float
    work: float
    """Forward, backward, optimizer."""
    collective: float
    wait: float
    """For messages of other stages."""
    micro_batches: float
    """Of a schedule."""

    @property
    def idle(self) -> float:
        """Share without work: the end of a pipeline is waited for in a collective."""
        return self.wait + self.collective

    @property
    def bubble(self) -> float:
        """Share that a stage waits in 1F1B when all passes take equally long."""
        idle = self.process.stages - 1
        return idle / (idle + self.micro_batches * self.process.chunks)


def stage_shares(timeline: Timeline) -> list[StageShares]:
    """Of all phases that run on training ranks, in the order in which they begin."""
    found: dict[tuple[str, str, int], list[StageShares]] = {}
    for lane in sorted(timeline.lanes, key=lambda one: one.process.stage):
        for call in _of_kind(lane, ("call",)):
            # A sync has no schedule, and its canary is no phase of its own.
            if not call.name.startswith("sync_weights"):
                key = (call.name, lane.process.group, lane.process.stage)
                found.setdefault(key, []).append(_shares(lane, call))
    return [_mean(group) for group in found.values()]


def _shares(lane: Lane, call: Span) -> StageShares:
    whole = (call.began, call.ended)
    schedules = _inside(lane, ("schedule",), whole)
    collective = _inside(lane, ("collective",), whole)
    # The optimizer's step has a collective in it.
    work = without(_inside(lane, COMPUTE, whole), collective)
    busy = union([*work, *collective])
    idle = length(schedules) - length(common(schedules, busy))
    passes = [one for one in _of_kind(lane, ("forward",)) if _is_in(one, whole)]
    runs = len([one for one in _of_kind(lane, ("schedule",)) if _is_in(one, whole)])
    total = max(1, call.ended - call.began)
    return StageShares(
        call.name,
        lane.process,
        total / NS,
        length(work) / total,
        length(collective) / total,
        idle / total,
        len(passes) / max(1, runs) / lane.process.chunks,
    )


def _mean(group: Sequence[StageShares]) -> StageShares:
    """Of the calls and ranks of a stage."""
    columns = ("seconds", "work", "collective", "wait", "micro_batches")
    means = [fmean(map(attrgetter(name), group)) for name in columns]
    return StageShares(group[0].phase, group[0].process, *means)


@dataclass(frozen=True)
class EngineShares:
    """One engine, by its first rank."""

    name: str
    stepping: float
    """Share of the step in which it took steps."""
    requests: int
    most: int
    """Requests at once."""
    few_s: float
    """Seconds at the end of its requests in which it had fewer than a quarter of `most`."""
    first_token_s: float | None
    """Mean seconds from a request's submission to its first token."""


def engine_shares(timeline: Timeline) -> list[EngineShares]:
    """Of the engines that had requests."""
    found = []
    for lane in timeline.lanes:
        requests = lane.record.requests
        if lane.process.group == "engine" and requests:
            steps = _inside(lane, ("prefill", "decode"), (0, timeline.ended))
            first = [
                (one.first_token - one.submitted) / NS
                for one in requests
                if one.first_token is not None
            ]
            most, few = _tail(requests, timeline.ended)
            mean = fmean(first) if first else None
            stepping = length(steps) / max(1, timeline.ended)
            name = lane.process.name.partition(" rank")[0]
            found.append(EngineShares(name, stepping, len(requests), most, few / NS, mean))
    return found


def counts(requests: Iterable[RequestLife], end: int) -> list[tuple[int, int]]:
    """How many requests an engine has from each time on."""
    changes: dict[int, int] = {}
    for one in requests:
        changes[one.submitted] = changes.get(one.submitted, 0) + 1
        ended = end if one.ended is None else one.ended
        changes[ended] = changes.get(ended, 0) - 1
    found, count = [], 0
    for at in sorted(changes):
        count += changes[at]
        found.append((at, count))
    return found


def _tail(requests: Sequence[RequestLife], end: int) -> tuple[int, int]:
    """The most at once; and ns at the end in which there were few of them."""
    steps = counts(requests, end)
    most = max(count for _, count in steps)
    last = max(at for at, _ in steps)
    began = last
    for at, count in reversed(steps[:-1]):
        if count * FEW >= most:
            break
        began = at
    return most, last - began


@dataclass(frozen=True)
class StepShares:
    """Who is at work, as shares of the step."""

    training: float
    """Any training rank computes."""
    engines: float
    """Any engine takes a step."""
    both: float
    nobody: float
    """Neither they nor a transfer."""
    nobody_in: tuple[tuple[str, float], ...]
    """By phase of the driver, the largest first; "between the phases" too."""


def step_shares(timeline: Timeline) -> StepShares:
    """Of one step."""
    whole, total = (0, timeline.ended), max(1, timeline.ended)
    training, engines, any_ = [], [], []
    for lane in timeline.lanes:
        training += _inside(lane, COMPUTE, whole)
        engines += _inside(lane, ("prefill", "decode"), whole)
        any_ += _inside(lane, (*WORK, "collective"), whole)
    training, engines = union(training), union(engines)
    idle = without([whole], union(any_))
    return StepShares(
        length(training) / total,
        length(engines) / total,
        length(common(training, engines)) / total,
        length(idle) / total,
        _by_phase(timeline, idle),
    )


def _by_phase(timeline: Timeline, idle: Sequence[Interval]) -> tuple[tuple[str, float], ...]:
    phases: dict[str, list[Interval]] = {}
    for lane in timeline.lanes:
        for one in _of_kind(lane, ("phase",)):
            phases.setdefault(one.name, []).append((one.began, one.ended))
    shares = {name: length(common(idle, union(times))) for name, times in phases.items()}
    in_phases = union(chain.from_iterable(phases.values()))
    shares["between the phases"] = length(idle) - length(common(idle, in_phases))
    total = max(1, timeline.ended)
    found = [(name, time / total) for name, time in shares.items() if time]
    return tuple(sorted(found, key=lambda item: -item[1]))


def in_words(timeline: Timeline) -> list[str]:
    """Where the step's time went and what waited, a sentence or two each."""
    return [*_step_words(timeline), *_stage_words(timeline), *_engine_words(timeline)]


def _step_words(timeline: Timeline) -> list[str]:
    shares = step_shares(timeline)
    text = (
        f"Of the {timeline.ended / NS:.2f} s of step {timeline.step}, training ranks compute in "
        f"{_share(shares.training)}, engines take steps in {_share(shares.engines)}, both at once "
        f"in {_share(shares.both)}, and nobody is at work in {_share(shares.nobody)}"
    )
    places = [f"{name} {_share(part)}" for name, part in shares.nobody_in[:3] if part >= NAMED]
    return [f"{text} ({', '.join(places)})." if places else f"{text}."]


def _stage_words(timeline: Timeline) -> list[str]:
    by_phase: dict[tuple[str, str], list[StageShares]] = {}
    for one in stage_shares(timeline):
        by_phase.setdefault((one.phase, one.process.group), []).append(one)
    return [_phase_words(stages) for stages in by_phase.values()]


def _phase_words(stages: Sequence[StageShares]) -> str:
    first = stages[0]
    head = f"{first.phase} ({max(one.seconds for one in stages):.2f} s)"
    micro = f"{first.micro_batches:.3g} micro-batch{'' if first.micro_batches == 1 else 'es'}"
    if first.process.stages == 1:
        return (
            f"{head}: ranks compute {_share(first.work)} of it and are in collectives with other "
            f"replicas {_share(first.collective)}, over {micro}."
        )
    bubble = f"the bubble of 1F1B with {micro} would be {_share(first.bubble)}"
    text = f"{head}: {_waits(stages)} of it; {bubble}"
    if fmean(one.idle for one in stages) > first.bubble + UNEQUAL:
        return f"{text}: micro-batches or stages take unequally long, or messages take long."
    if first.bubble >= UNEQUAL:
        return f"{text}: smaller micro-batches make it smaller."
    return f"{text}."


def _waits(stages: Sequence[StageShares]) -> str:
    """Of each stage, or of the ends where there are many."""
    if len(stages) <= EACH:
        return ", ".join(f"stage {one.process.stage} waits {_share(one.idle)}" for one in stages)
    least, most = (pick(stages, key=lambda one: one.idle) for pick in (min, max))
    return (
        f"stages wait {_share(least.idle)} (stage {least.process.stage}) to {_share(most.idle)} "
        f"(stage {most.process.stage})"
    )


def _engine_words(timeline: Timeline) -> list[str]:
    found, engines = [], engine_shares(timeline)
    for one in engines[:EACH]:
        text = (
            f"{one.name.capitalize()} takes steps in {_share(one.stepping)} of the step, for "
            f"{one.requests} requests, {one.most} at once"
        )
        if one.first_token_s is not None:
            text += f"; the first token of one comes after {one.first_token_s:.2f} s on average"
        if one.few_s * NS >= NAMED * timeline.ended:
            text += f"; the last {one.few_s:.2f} s are for fewer than a quarter of them"
        found.append(f"{text}.")
    if len(engines) > EACH:
        found.append(f"{len(engines) - EACH} more engines are in the file.")
    return found


def _of_kind(lane: Lane, kinds: Collection[str]) -> list[Span]:
    return [one for one in lane.record.spans if one.kind in kinds]


def _is_in(one: Span, whole: Interval) -> bool:
    return whole[0] <= one.began and one.ended <= whole[1]


def _inside(lane: Lane, kinds: Collection[str], whole: Interval) -> list[Interval]:
    """Where a lane is in such spans, cut to `whole`."""
    return common(union((one.began, one.ended) for one in _of_kind(lane, kinds)), [whole])


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
