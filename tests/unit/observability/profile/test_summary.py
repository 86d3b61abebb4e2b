"""Where a step lost time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.timelines import MS, forward_only, pipeline, span, timeline

from rlhf3d.observability.profile.spans import Record, RequestLife
from rlhf3d.observability.profile.summary import (
    counts,
    engine_shares,
    rank_shares,
    step_shares,
)
from rlhf3d.observability.profile.timeline import Lane, Process, Timeline


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 4), (4, 8), (1, 3)])
def test_equal_passes_wait_for_the_bubble_of_1f1b(stages: int, micro_batches: int) -> None:
    found = rank_shares(timeline(stages, micro_batches))
    assert [one.process.stage for one in found] == list(range(stages))
    for one in found:
        assert one.micro_batches == micro_batches
        assert one.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
        assert one.wait == pytest.approx(one.bubble)
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


def test_collectives_are_not_waits_for_stages() -> None:
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
    (one,) = rank_shares(Timeline(1, 100 * MS, (lane,)))
    assert (one.work, one.collective, one.wait) == pytest.approx((0.6, 0.3, 0.1))


def test_forward_passes_alone_wait_for_the_first_input() -> None:
    found = rank_shares(forward_only(3, [512, 512]))
    assert [one.updates for one in found] == [False] * 3
    assert [one.bubble for one in found] == pytest.approx([0, 1 / 3, 2 / 4])
    assert [one.wait for one in found] == pytest.approx([0, 1 / 3, 2 / 4])


def test_a_rank_without_passes_has_no_bubble() -> None:
    lane = Lane(Process("a", "actor", 0, 2), Record("m", (span("values", "call", 0, 9),)))
    (one,) = rank_shares(Timeline(1, 10 * MS, (lane,)))
    assert (one.bubble, one.wait, one.micro_batches) == (0, 0, 0)


def test_the_calls_of_a_phase_are_one() -> None:
    spans = (
        span("update_actor", "call", 0, 20),
        span("pipeline", "schedule", 0, 20),
        span("forward", "forward", 0, 10, micro_batch=0, tokens=40),
        span("update_actor", "call", 50, 70),
        span("pipeline", "schedule", 50, 70),
        span("forward", "forward", 50, 70, micro_batch=0, tokens=30),
    )
    lane = Lane(Process("actor tp0 pp0 dp0", "actor", 0, 2), Record("m", spans))
    (one,) = rank_shares(Timeline(1, 100 * MS, (lane,)))
    assert one.seconds == pytest.approx(0.04)
    assert (one.work, one.wait, one.micro_batches) == pytest.approx((0.75, 0.25, 1))
    assert one.tokens == {0: 30}


def test_who_is_at_work() -> None:
    driver = (span("generate", "phase", 0, 40), span("update_actor", "phase", 50, 100))
    rank = (span("call", "call", 50, 100), span("forward", "forward", 60, 90))
    engine = (span("decode", "decode", 0, 30), span("decode", "decode", 80, 85))
    rank = (*rank, span("reduce", "collective", 85, 98))
    lanes = [
        Lane(Process(name, name), Record("m", spans))
        for name, spans in (("driver", driver), ("actor", rank), ("engine", engine))
    ]
    shares = step_shares(Timeline(1, 100 * MS, tuple(lanes)))
    assert (shares.training, shares.engines, shares.both) == pytest.approx((0.3, 0.35, 0.05))
    assert (shares.exchange, shares.nobody) == pytest.approx((0.08, 0.32))
    assert dict(shares.nobody_in) == pytest.approx(
        {"update_actor": 0.12, "generate": 0.1, "between the phases": 0.1}
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
