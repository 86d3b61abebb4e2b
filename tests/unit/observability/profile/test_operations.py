"""Traces of torch's operations, on the step's clock."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import torch

from rlhf3d.observability.profile.operations import Operations, OperationsSettings, shifted
from rlhf3d.observability.profile.recorder import span, start_recording, take_record


def test_times_are_moved_and_nothing_else() -> None:
    """Digits below a µs stay, whatever the base."""
    lines = [
        '    "baseTimeNanoseconds": 1790857026000000000,\n',
        '    "ph": "X", "name": "\\"ts\\": 5", "ts": 5109912226728.792, "dur": 3,\n',
        '    "ts": 5109912226730,\n',
    ]
    base = 1790857026000000000
    moved = list(shifted(lines, base + 5109912226000_000))
    assert moved[0] == '    "baseTimeNanoseconds": 0,\n'
    assert moved[1] == lines[1].replace("5109912226728.792", "728.792")
    assert moved[2] == '    "ts": 730.000,\n'


def test_each_phase_is_traced_once_and_on_the_spans_clock(tmp_path: Path) -> None:
    settings = OperationsSettings(str(tmp_path / "profile"), "actor tp0 pp0 dp0", 60.0)
    began = time.monotonic_ns()
    start_recording(operations=settings)
    for phase in ("old_logprobs", "update_actor", "update_actor"):
        with span(phase, "call"):
            torch.ones(64, 64) @ torch.ones(64, 64)
    record = take_record(began)
    assert record is not None
    files = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert files == [
        "actor_tp0_pp0_dp0.old_logprobs.json.gz",
        "actor_tp0_pp0_dp0.update_actor.json.gz",
    ]
    for call, file in zip(record.spans[:2], files, strict=True):
        with gzip.open(tmp_path / "profile" / file, "rt") as content:
            events = json.load(content)["traceEvents"]
        product = next(e for e in events if e["name"] == "aten::matmul")
        at = began + 1000 * product["ts"]
        slack = 2_000_000
        assert call.began - slack <= at <= at + 1000 * product["dur"] <= call.ended + slack


def test_a_trace_ends_when_its_time_is_over() -> None:
    traces = Operations(OperationsSettings("unused", "engine 0", 0.0))
    traces.begin("generate")
    assert traces._running == "generate"
    time.sleep(0.001)
    traces.look()
    assert traces._running is None
    traces.begin("generate")
    assert traces._running is None
