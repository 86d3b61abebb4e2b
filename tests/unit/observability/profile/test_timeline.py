"""The step of all processes on one clock, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.timelines import timeline

from rlhf3d.observability.profile.clock import Offset
from rlhf3d.observability.profile.spans import Record, RequestLife, Span
from rlhf3d.observability.profile.timeline import (
    Lane,
    Process,
    folder_of,
    merge,
    profiled_steps,
    read_timeline,
    trace,
    write_timeline,
)

HERE, THERE = Process("driver", "driver"), Process("actor tp0 pp0 dp0", "actor")


def test_merge_brings_all_to_the_drivers_clock() -> None:
    own = Record("a", (Span("generate", "phase", 1_000, 5_000),))
    life = RequestLife(0, 91_500, None, 94_000, 3, 2)
    other = Record(
        "b", (Span("late", "wait", 93_000, 94_000), Span("x", "call", 92_000, 94_000)), (life,)
    )
    merged = merge(3, 1_000, 6_000, [Lane(HERE, own), Lane(THERE, other, Offset(90_000, 40))])
    driver, actor = merged.lanes
    assert merged.ended == 5_000
    assert [(one.began, one.ended) for one in driver.record.spans] == [(0, 4_000)]
    assert [(one.name, one.began) for one in actor.record.spans] == [("x", 1_000), ("late", 2_000)]
    (request,) = actor.record.requests
    assert (request.submitted, request.first_token, request.ended) == (500, None, 3_000)
    assert (driver.offset.error_ns, actor.offset.error_ns) == (0, 40)


def test_what_is_outside_of_the_step_is_cut() -> None:
    """Engines go on beside it: recorders begin before the driver's, and are taken after it."""
    spans = (
        Span("before", "decode", 100, 900),
        Span("into", "decode", 900, 1_300),
        Span("out", "decode", 1_900, 2_200),
        Span("after", "decode", 2_100, 2_300),
    )
    lives = (
        RequestLife(0, 900, 950, 1_500, 1, 3),
        RequestLife(1, 1_200, 2_100, 2_200, 1, 3),
        RequestLife(2, 2_100, None, None, 1, 0),
    )
    lane = Lane(Process("engine 0", "engine"), Record("a", spans, lives))
    (merged,) = merge(1, 1_000, 2_000, [lane]).lanes
    assert [(one.name, one.began, one.ended) for one in merged.record.spans] == [
        ("into", 0, 300),
        ("out", 900, 1_000),
    ]
    assert [(one.submitted, one.first_token, one.ended) for one in merged.record.requests] == [
        (0, 0, 500),
        (200, None, None),
    ]


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    made = timeline()
    write_timeline(tmp_path, made)
    assert read_timeline(tmp_path, 3) == made
    assert profiled_steps(tmp_path) == [3]
    assert profiled_steps(tmp_path / "none") == []


def test_the_file_is_trace_event_json() -> None:
    content = json.loads(json.dumps(trace(timeline())))
    events = content["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"driver", "actor tp0 pp0 dp0", "actor tp0 pp1 dp0", "engine 0"}
    begins, ends = ({e["id"] for e in events if e["ph"] == ph} for ph in "be")
    assert begins == ends and len(begins) == 24
    counted = [e["args"]["requests"] for e in events if e["ph"] == "C"]
    assert max(counted) == 24 and counted[-1] == 0
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": [{}], "otherData": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    folder = folder_of(tmp_path, 3)
    folder.mkdir(parents=True)
    (folder / "timeline.json").write_text(text)
    with pytest.raises(ValueError, match=r"timeline\.json is not a timeline"):
        read_timeline(tmp_path, 3)
