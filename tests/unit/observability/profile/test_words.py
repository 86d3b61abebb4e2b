"""What is said of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from support.timelines import forward_only, timeline

from rlhf3d.observability.profile.spans import Record, Span
from rlhf3d.observability.profile.timeline import Lane, Process, Timeline
from rlhf3d.observability.profile.words import in_words


def test_words_have_the_figures() -> None:
    step, update, pipeline, advice, engine = in_words(timeline(2, 4))
    assert "at least one training rank computes in" in step and "nobody is at work in" in step
    assert (
        update
        == "update_actor (0.15 s): stage 0 waits for other stages 20 % of it, stage 1 waits 20 %."
    )
    assert pipeline == (
        "Even when all passes take equally long, a pipeline of 2 stages and 4 micro-batches "
        "idles 20 % of an update."
    )
    assert "actor.ppo_micro_batch_size_per_gpu" in advice and "(0.0 s)" in advice
    assert engine.startswith("Engine 0 takes steps in") and "24 requests, 24 at once" in engine


def test_many_stages_are_told_by_the_ends() -> None:
    words = in_words(timeline(7, 14))[1]
    assert "ranks wait for other stages 30 % (actor tp0 pp0 dp0) to 30 %" in words


def test_collectives_are_told_beside_the_waits() -> None:
    def collect(one: Span) -> Span:
        last = one.kind == "backward" and one.details["micro_batch"] == 3
        return replace(one, kind="collective") if last else one

    words = in_words(_changed(timeline(2, 4), 1, collect))[1]
    assert (
        "stage 0 waits for other stages 20 % of it, stage 1 waits 20 %; collectives take 0 to 13 %"
        in words
    )


def test_replicas_that_differ_are_a_range_and_the_worst_is_named() -> None:
    made = timeline(2, 4)
    slow = replace(made.lanes[2], process=Process("actor tp0 pp1 dp1", "actor", 1, 2))
    made = replace(made, lanes=(*made.lanes[:3], slow, *made.lanes[3:]))

    def quick(one: Span) -> Span:
        return replace(one, ended=one.began + 1) if one.kind == "backward" else one

    words = in_words(_changed(made, 3, quick))[1]
    assert "stage 0 waits for other stages 20 % of it, stage 1 waits 20 to 73 %" in words
    assert "actor tp0 pp1 dp1 waits 73 %, where equally long passes would make it 20 %." in words


def test_forward_passes_alone_have_their_own_bubble() -> None:
    _, values, pipeline, advice = in_words(forward_only(2, [512, 512, 512]))
    assert values.endswith("stage 0 waits for other stages 0 % of it, stage 1 waits 25 %.")
    assert pipeline == (
        "Even when all passes take equally long, a pipeline of 2 stages and 3 micro-batches "
        "waits 25 % (last stage) and 0 % (first stage) of a phase with forward passes only."
    )
    assert "waits for other stages in 12 % of the step" in advice


def test_unequal_micro_batches_are_said_with_the_smallest() -> None:
    words = in_words(forward_only(2, [238, 200, 1]))[2]
    assert words.endswith("1 (number 2 of actor tp0 pp0 dp0) to 238 tokens.")


def test_a_short_wait_is_no_reason_for_advice() -> None:
    made = forward_only(2, [512] * 3)
    assert len(in_words(made)) == 4
    longer = replace(made, ended=10 * made.ended)
    assert not [line for line in in_words(longer) if "Smaller" in line]


def test_the_shares_of_a_step_are_all_of_it() -> None:
    (step, *_) = in_words(forward_only(2, [512, 512, 512]))
    assert step == (
        "Of the 0.04 s of step 3, at least one training rank computes in 100 %, at least one "
        "engine takes steps in 0 %, processes only exchange weights or gradients in 0 %, and "
        "nobody is at work in 0 %."
    )


def test_nothing_asserts_where_nothing_was_recorded() -> None:
    empty = Lane(Process("driver", "driver"), Record("m", ()))
    assert len(in_words(Timeline(1, 0, (empty,)))) == 1


def _changed(made: Timeline, lane: int, change: Callable[[Span], Span]) -> Timeline:
    lanes = list(made.lanes)
    record = lanes[lane].record
    spans = tuple(map(change, record.spans))
    lanes[lane] = replace(lanes[lane], record=replace(record, spans=spans))
    return replace(made, lanes=tuple(lanes))
