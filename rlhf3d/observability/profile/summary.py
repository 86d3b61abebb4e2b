"""Where a profiled step lost time, in shares.

Invariant: every figure follows from the spans alone. A stage waits where its part of the pipeline's
schedule is neither a pass nor a collective; what a pass waits for inside itself (its tensor ranks)
counts as work. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from rlhf3d.observability.profile.intervals import Interval, common, length, union, without
from rlhf3d.observability.profile.spans import Kind, RequestLife, Span
from rlhf3d.observability.profile.timeline import Lane, Process, Timeline
from rlhf3d.units import NS

WORK: tuple[Kind, ...] = ("forward", "backward", "optimizer", "transfer", "prefill", "decode")
COMPUTE: tuple[Kind, ...] = ("forward", "backward", "optimizer")
FEW = 4
"""An engine has few requests where it has less than one in so many of its most."""


@dataclass(frozen=True)
class RankShares:
    """The calls of one phase on one training rank; shares of their time."""

    phase: str
    process: Process
    seconds: float
    work: float
    """Forward, backward, optimizer."""
    collective: float
    """With other replicas or stages; what is waited for in it counts as well."""
    wait: float
    """For messages of other stages."""
    micro_batches: float
    """Of a schedule."""
    updates: bool
    """There are backward passes."""
    tokens: Mapping[int, int]
    """Of each micro-batch, with padding; the fewest where several schedules have its number."""

    @property
    def bubble(self) -> float:
        """Share that it waits when all passes take equally long.

        An update begins and ends with all stages. In forward passes alone a stage only waits for
        its first input: the ones before it are done sooner.
        """
        stages = self.process.stages
        idle = stages - 1 if self.updates else self.process.stage
        return idle and idle / (idle + self.micro_batches * self.process.chunks)


def rank_shares(timeline: Timeline) -> list[RankShares]:
    """Of all phases that run on training ranks, in the order in which they begin."""
    found: dict[tuple[str, int], list[Span]] = {}
    for number, lane in enumerate(timeline.lanes):
        for call in _of_kind(lane, ("call",)):
            # A sync has no schedule, and its canary is no phase of its own.
            if not call.name.startswith("sync_weights"):
                found.setdefault((call.name, number), []).append(call)
    shares = [_shares(timeline.lanes[number], calls) for (_, number), calls in found.items()]
    return sorted(shares, key=lambda one: one.process.stage)


def _shares(lane: Lane, calls: Sequence[Span]) -> RankShares:
    wholes = union((one.began, one.ended) for one in calls)
    schedules = _inside(lane, ("schedule",), wholes)
    collective = _inside(lane, ("collective",), wholes)
    # The optimizer's step has a collective in it.
    work = without(_inside(lane, COMPUTE, wholes), collective)
    busy = union([*work, *collective])
    idle = length(schedules) - length(common(schedules, busy))
    inner = [one for one in lane.record.spans if _is_in(one, wholes)]
    passes = [one for one in inner if one.kind == "forward"]
    runs = sum(one.kind == "schedule" for one in inner)
    total = max(1, length(wholes))
    return RankShares(
        calls[0].name,
        lane.process,
        total / NS,
        length(work) / total,
        length(collective) / total,
        idle / total,
        len(passes) / max(1, runs) / lane.process.chunks,
        any(one.kind == "backward" for one in inner),
        _tokens(passes),
    )


def _tokens(passes: Iterable[Span]) -> dict[int, int]:
    found: dict[int, int] = {}
    for one in passes:
        number, count = one.details.get("micro_batch"), one.details.get("tokens")
        if number is not None and count is not None:
            found[number] = min(count, found.get(number, count))
    return found


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
            steps = _inside(lane, ("prefill", "decode"), [(0, timeline.ended)])
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
    exchange: float
    """Neither, but weights travel or ranks are in a collective."""
    nobody: float
    """Neither they nor a transfer."""
    nobody_in: tuple[tuple[str, float], ...]
    """By phase of the driver, the largest first; "between the phases" too."""


def step_shares(timeline: Timeline) -> StepShares:
    """Of one step."""
    whole, total = [(0, timeline.ended)], max(1, timeline.ended)
    training, engines, any_ = [], [], []
    for lane in timeline.lanes:
        training += _inside(lane, COMPUTE, whole)
        engines += _inside(lane, ("prefill", "decode"), whole)
        any_ += _inside(lane, (*WORK, "collective"), whole)
    training, engines = union(training), union(engines)
    any_ = union(any_)
    idle = without(whole, any_)
    return StepShares(
        length(training) / total,
        length(engines) / total,
        length(common(training, engines)) / total,
        length(without(any_, union([*training, *engines]))) / total,
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


def _of_kind(lane: Lane, kinds: Collection[str]) -> list[Span]:
    return [one for one in lane.record.spans if one.kind in kinds]


def _is_in(one: Span, wholes: Iterable[Interval]) -> bool:
    return any(began <= one.began and one.ended <= ended for began, ended in wholes)


def _inside(lane: Lane, kinds: Collection[str], wholes: Sequence[Interval]) -> list[Interval]:
    """Where a lane is in such spans, cut to `wholes`."""
    return common(union((one.began, one.ended) for one in _of_kind(lane, kinds)), wholes)
