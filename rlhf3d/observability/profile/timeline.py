"""A profiled step of all processes on one clock, and the file that holds it.

Invariant: times are ns since the step began on the driver, and none is outside of the step; the
file is Trace Event JSON, as Perfetto and chrome://tracing open it, and holds all that the timeline
does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf3d.observability.profile.clock import SAME, Offset
from rlhf3d.observability.profile.spans import Record, RequestLife, Span
from rlhf3d.observability.whole_file import whole_file

PROFILE_FOLDER = "profile"
TIMELINE_FILE = "timeline.json"
NS_PER_US = 1000


@dataclass(frozen=True)
class Process:
    """One that was recorded."""

    name: str
    """`driver`, `actor tp0 pp1 dp0`, `engine 0 rank 1`."""
    group: str
    """driver, engine, or the worker group."""
    stage: int = 0
    """Of the pipeline."""
    stages: int = 1
    chunks: int = 1
    """Parts of the model on each stage."""


@dataclass(frozen=True)
class Lane:
    """What a process did."""

    process: Process
    record: Record
    offset: Offset = SAME
    """What was taken from its times."""


@dataclass(frozen=True)
class Timeline:
    """One step."""

    step: int
    ended: int
    lanes: tuple[Lane, ...]


def merge(step: int, began: int, ended: int, lanes: Iterable[Lane]) -> Timeline:
    """Bring lanes, with times of their machines, to the driver's clock, and its `began` to 0."""
    length, shifted = ended - began, []
    for lane in lanes:
        record = _shifted(lane.record, lane.offset.ns + began, length)
        shifted.append(replace(lane, record=record))
    return Timeline(step, length, tuple(shifted))


def _shifted(record: Record, by: int, length: int) -> Record:
    """With `by` taken from its times, and only what is in the step."""

    def within(time: int) -> int:
        return min(max(time - by, 0), length)

    def until(time: int | None) -> int | None:
        """None for what comes after the step."""
        return None if time is None or time - by > length else within(time)

    spans = [
        replace(one, began=within(one.began), ended=within(one.ended))
        for one in record.spans
        if one.ended >= by and one.began - by <= length
    ]
    requests = [
        replace(
            one,
            submitted=within(one.submitted),
            first_token=until(one.first_token),
            ended=until(one.ended),
        )
        for one in record.requests
        if one.submitted - by <= length
    ]
    in_order = sorted(spans, key=lambda one: (one.began, -one.ended))
    return replace(record, spans=tuple(in_order), requests=tuple(requests))


def folder_of(run: Path, step: int) -> Path:
    """Where the profile of a step is."""
    return run / PROFILE_FOLDER / f"step_{step:06d}"


def profiled_steps(run: Path) -> list[int]:
    """The steps of which a run's folder has a timeline, in order."""
    files = (run / PROFILE_FOLDER).glob(f"step_*/{TIMELINE_FILE}")
    numbers = [file.parent.name.removeprefix("step_") for file in files]
    return sorted(int(number) for number in numbers if number.isdecimal())


def write_timeline(run: Path, timeline: Timeline) -> Path:
    """Write (or, after a resume, replace) the file of a step."""
    path = folder_of(run, timeline.step) / TIMELINE_FILE
    with whole_file(path) as file:
        file.write(json.dumps(trace(timeline), separators=(",", ":")))
    return path


def trace(timeline: Timeline) -> dict[str, Any]:
    """As Trace Event JSON."""
    events: list[dict[str, Any]] = []
    for pid, lane in enumerate(timeline.lanes):
        events += _names(pid, lane.process.name)
        events += [_complete(pid, one) for one in lane.record.spans]
        for request in lane.record.requests:
            events += _request(pid, request, timeline.ended)
        events += _running(pid, lane.record.requests)
    processes = [
        {
            **asdict(lane.process),
            "machine": lane.record.machine,
            "clock_offset_us": lane.offset.ns / NS_PER_US,
            "clock_error_us": lane.offset.error_ns / NS_PER_US,
        }
        for lane in timeline.lanes
    ]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "step": timeline.step,
            "step_us": timeline.ended / NS_PER_US,
            "processes": processes,
        },
    }


def _names(pid: int, name: str) -> Iterator[dict[str, Any]]:
    """What a viewer calls a process, and where it puts it."""
    for event, value in (
        ("process_name", {"name": name}),
        ("process_sort_index", {"sort_index": pid}),
        ("thread_name", {"name": name}),
    ):
        yield {"ph": "M", "pid": pid, "tid": 0, "name": event, "args": value}


def _complete(pid: int, one: Span) -> dict[str, Any]:
    event = {"ph": "X", "pid": pid, "tid": 0, "name": one.name, "cat": one.kind}
    times = {"ts": one.began / NS_PER_US, "dur": (one.ended - one.began) / NS_PER_US}
    return {**event, **times, "args": dict(one.details)}


def _request(pid: int, one: RequestLife, end: int) -> Iterator[dict[str, Any]]:
    """A line from submission to end, its first token a mark on it."""
    same = {"pid": pid, "cat": "request", "id": f"{pid}.{one.number}", "name": "request"}
    about = {"number": one.number, "prompt_tokens": one.prompt_tokens, "tokens": one.tokens}
    yield {"ph": "b", "ts": one.submitted / NS_PER_US, **same, "args": about}
    if one.first_token is not None:
        mark = {**same, "name": "first token"}
        yield {"ph": "n", "ts": one.first_token / NS_PER_US, **mark, "args": {}}
    finish = "aborted" if one.aborted else "finished"
    if one.ended is None:
        finish = "unfinished"
    last = end if one.ended is None else one.ended
    yield {"ph": "e", "ts": last / NS_PER_US, **same, "args": {"end": finish}}


def _running(pid: int, requests: Sequence[RequestLife]) -> Iterator[dict[str, Any]]:
    """How many requests an engine has, as they come and go."""
    changes = [(one.submitted, 1) for one in requests]
    changes += [(one.ended, -1) for one in requests if one.ended is not None]
    count = 0
    for at, change in sorted(changes):
        count += change
        event = {"ph": "C", "pid": pid, "name": "requests", "ts": at / NS_PER_US}
        yield {**event, "args": {"requests": count}}


def read_timeline(run: Path, step: int) -> Timeline:
    """Read a step's file. ValueError where it is none of ours."""
    path = folder_of(run, step) / TIMELINE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _timeline(content["traceEvents"], content["otherData"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a timeline as a run writes it ({type(error).__name__}: {error})"
        ) from error


def _timeline(events: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> Timeline:
    spans: dict[int, list[Span]] = {}
    requests: dict[int, dict[str, RequestLife]] = {}
    for event in events:
        if event["ph"] == "X":
            began = _ns(event["ts"])
            times = (began, began + _ns(event["dur"]))
            one = Span(event["name"], event["cat"], *times, event["args"])
            spans.setdefault(event["pid"], []).append(one)
        elif event["ph"] in ("b", "n", "e"):
            of_lane = requests.setdefault(event["pid"], {})
            of_lane[event["id"]] = _told(of_lane.get(event["id"]), event)
    lanes = []
    for pid, facts in enumerate(about["processes"]):
        process = Process(**{key: facts[key] for key in Process.__dataclass_fields__})
        offset = Offset(_ns(facts["clock_offset_us"]), _ns(facts["clock_error_us"]))
        lives = tuple(requests.get(pid, {}).values())
        lanes.append(
            Lane(process, Record(facts["machine"], tuple(spans.get(pid, ())), lives), offset)
        )
    return Timeline(int(about["step"]), _ns(about["step_us"]), tuple(lanes))


def _told(life: RequestLife | None, event: Mapping[str, Any]) -> RequestLife:
    """A request, with what one more event says of it."""
    at, about = _ns(event["ts"]), event["args"]
    if event["ph"] == "b":
        return RequestLife(about["number"], at, None, None, about["prompt_tokens"], about["tokens"])
    if life is None:
        raise ValueError(f"request {event['id']} does not begin")
    if event["ph"] == "n":
        return replace(life, first_token=at)
    if about["end"] == "unfinished":
        return life
    return replace(life, ended=at, aborted=about["end"] == "aborted")


def _ns(us: float) -> int:
    return round(us * NS_PER_US)
