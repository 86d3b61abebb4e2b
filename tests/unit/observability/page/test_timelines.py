"""Profiled steps on the page: what is drawn, what is left out, what cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from support.page_runs import healthy_rows, write_rows
from support.timelines import MS, timeline

from rlhf3d.observability.page.collect import RunFacts, collect
from rlhf3d.observability.page.render import page_data
from rlhf3d.observability.page.timelines import STEPS, drawn, packed, profiles
from rlhf3d.observability.profile.spans import Record, RequestLife, Span
from rlhf3d.observability.profile.timeline import (
    Lane,
    Process,
    Timeline,
    folder_of,
    write_timeline,
)
from rlhf3d.observability.report import make_report


def test_all_of_a_small_step_is_drawn() -> None:
    made = timeline(2, 4)
    found = drawn(made, 1000, "timeline.json")
    assert [lane.name for lane in found.lanes] == [lane.process.name for lane in made.lanes]
    assert found.end == made.ended // 1000 and "Left out" not in found.note
    stage = found.lanes[1]
    kinds = [found.kinds[one[2]] for one in stage.spans]
    assert kinds[:4] == ["call", "schedule", "forward", "forward"]
    began, took, _, label = stage.spans[2]
    assert took == 10 * MS // 1000 and began == made.lanes[1].record.spans[2].began // 1000
    assert found.labels[label] == "forward, micro batch 0, chunk 0, tokens 512"
    assert len(found.lanes[3].requests) == 24


def test_the_shortest_spans_are_left_out_and_counted() -> None:
    spans = tuple(Span("s", "forward", at * MS, (at + 1 + at % 5) * MS) for at in range(50))
    lane = Lane(Process("a", "actor"), Record("m", spans))
    found = drawn(Timeline(1, 60 * MS, (lane,)), 25, "timeline.json")
    kept = found.lanes[0].spans
    # Ten of each length: two lengths have room, and of the third there are too many.
    assert len(kept) == 20 and min(took for _, took, *_ in kept) == 4000
    assert "Left out: 30 of 50 spans, each under 3000 µs. " in found.note


def test_steps_of_an_engine_are_joined_first() -> None:
    """Where nothing comes between them: an idle engine looks idle."""
    steps = [
        Span("decode", "decode", at * MS, (at + 1) * MS) for at in (*range(40), *range(60, 90))
    ]
    steps.insert(20, Span("prefill", "prefill", 20 * MS, 21 * MS))
    del steps[21]
    lane = Lane(Process("engine 0", "engine"), Record("m", tuple(steps)))
    found = drawn(Timeline(1, 100 * MS, (lane,)), 25, "timeline.json")
    told = [(began, took, found.labels[label]) for began, took, _, label in found.lanes[0].spans]
    assert told == [
        (0, 20_000, "decode, steps 20"),
        (20_000, 1_000, "prefill"),
        (21_000, 19_000, "decode, steps 19"),
        (60_000, 30_000, "decode, steps 30"),
    ]
    assert found.note.startswith("An engine's steps") and "Left out" not in found.note


def test_requests_are_packed_in_the_rows_they_need() -> None:
    lives = [
        RequestLife(0, 0, 1_000, 10_000, 1, 1),
        RequestLife(1, 0, 2_000, None, 1, 1),
        RequestLife(2, 10_000, None, 12_000, 1, 0, aborted=True),
        RequestLife(3, 11_000, 11_500, 13_000, 1, 1),
    ]
    found, rows = packed(lives)
    assert rows == 3 and [one[0] for one in found] == [0, 1, 0, 2]
    assert found[1] == [1, 0, 2, None, 1]


def test_the_last_profiles_of_a_run_are_shown_and_a_broken_one_is_named(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", healthy_rows(12))
    for step in range(1, STEPS + 2):
        write_timeline(run, replace(timeline(), step=step))
    (folder_of(run, 4) / "timeline.json").write_text("{")
    found = profiles(run)
    assert [one.step for one in found] == [2, 3, 4, 5]
    assert found[2].lanes == () and "profile of step 4 is not shown" in found[2].note
    view = collect(run, "run", healthy_rows(12), RunFacts())
    data = json.loads(json.dumps(page_data([view])["profiles"]))
    assert [one["step"] for one in data[0]] == [2, 3, 4, 5]
    report = make_report(run).read_text()
    assert "## Profiled steps" in report and "stage 0 waits for other stages 20 % of it" in report


def test_a_run_without_a_profile_has_none(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", healthy_rows(12))
    assert profiles(run) == []
    assert "Profiled" not in make_report(run).read_text()
