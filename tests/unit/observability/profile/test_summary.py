"""Where a step lost time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.timelines import MS, pipeline, span, timeline

from rlhf3d.observability.profile.spans import Record, RequestLife
from rlhf3d.observability.profile.summary import (
    counts,
    engine_shares,
    in_words,
    stage_shares,
    step_shares,
)
from rlhf3d.observability.profile.timeline import Lane, Process, Timeline


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 4), (4, 8), (1, 3)])
def test_equal_passes_wait_for_the_bubble_of_1f1b(stages: int, micro_batches: int) -> None:
    found = stage_shares(timeline(stages, micro_batches))
    assert [one.process.stage for one in found] == list(range(stages))
    for one in found:
        assert one.micro_batches == micro_batches
        assert one.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
        assert one.idle == pytest.approx(one.bubble)
        assert one.work == pytest.approx(1 - one.bubble)


def test_the_pipeline_of_the_tests_is_1f1b() -> None:
    first, last = pipeline(2, 2)
    assert [(one.kind, one.began // MS) for one in first] == [
        ("forward", 0),
        ("forward", 10),
        ("backward", 40),
        ("backward", 70),
    ]
    assert [one.began // MS for one in last] == [10, 20, 40, 50]


def test_collectives_count_as_waiting() -> None:
    spans = (
        span("update_actor", "call", 0, 100),
        span("pipeline", "schedule", 0, 80),
        span("forward", "forward", 10, 30),
        span("backward", "backward", 30, 60),
        span("reduce gradients", "collective", 60, 80),
        span("gather weights", "collective", 80, 90),
        span("optimizer step", "optimizer", 80, 100),
    )
    lane = Lane(Process("actor tp0 pp0 dp0", "actor", 0, 2), Record("m", spans))
    (one,) = stage_shares(Timeline(1, 100 * MS, (lane,)))
    assert (one.work, one.collective, one.wait) == pytest.approx((0.6, 0.3, 0.1))
    assert one.idle == pytest.approx(0.4)


def test_who_is_at_work() -> None:
    driver = (span("generate", "phase", 0, 40), span("update_actor", "phase", 50, 100))
    rank = (span("call", "call", 50, 100), span("forward", "forward", 60, 90))
    engine = (span("decode", "decode", 0, 30), span("decode", "decode", 80, 85))
    lanes = [
        Lane(Process(name, name), Record("m", spans))
        for name, spans in (("driver", driver), ("actor", rank), ("engine", engine))
    ]
    shares = step_shares(Timeline(1, 100 * MS, tuple(lanes)))
    assert (shares.training, shares.engines, shares.both) == pytest.approx((0.3, 0.35, 0.05))
    assert shares.nobody == pytest.approx(0.4)
    assert dict(shares.nobody_in) == pytest.approx(
        {"update_actor": 0.2, "generate": 0.1, "between the phases": 0.1}
    )


def test_requests_that_others_are_done_before() -> None:
    lives = [RequestLife(n, 0, 1 * MS, 10 * MS, 5, 5) for n in range(7)]
    lives.append(RequestLife(7, 0, 3 * MS, 40 * MS, 5, 20))
    lane = Lane(Process("engine 0 rank 0", "engine"), Record("m", (), tuple(lives)))
    (one,) = engine_shares(Timeline(1, 100 * MS, (lane,)))
    assert (one.name, one.requests, one.most) == ("engine 0", 8, 8)
    assert one.few_s == pytest.approx(0.03)
    assert one.first_token_s == pytest.approx(0.00125)
    unfinished = replace(lives[7], ended=None)
    assert counts([lives[0], unfinished], 90) == [(0, 2), (90, 1), (10 * MS, 0)]


def test_words_have_the_figures() -> None:
    step, update, engine = in_words(timeline(2, 4))
    assert "step 3" in step and "nobody is at work in" in step
    assert "stage 0 waits 20 %, stage 1 waits 20 % of it" in update
    assert "the bubble of 1F1B with 4 micro-batches would be 20 %" in update
    assert engine.startswith("Engine 0 takes steps in") and "24 requests, 24 at once" in engine


def test_many_stages_are_told_by_the_ends() -> None:
    assert "stages wait 30 % (stage 0) to 30 % (stage 0) of it" in in_words(timeline(7, 14))[1]


def test_a_slow_stage_is_said_to_be_one() -> None:
    made = timeline(2, 4)
    slow = made.lanes[2]
    spans = [
        replace(one, ended=one.began + 1) if one.kind in ("forward", "backward") else one
        for one in slow.record.spans
    ]
    lanes = (*made.lanes[:2], replace(slow, record=replace(slow.record, spans=tuple(spans))))
    assert "unequally long" in in_words(replace(made, lanes=lanes))[1]


def test_nothing_asserts_where_nothing_was_recorded() -> None:
    empty = Lane(Process("driver", "driver"), Record("m", ()))
    assert len(in_words(Timeline(1, 0, (empty,)))) == 1
