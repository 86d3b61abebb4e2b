"""What is advised: only what a run's configuration leaves to be done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.page_runs import healthy_rows, setup

from rlhf3d.observability.page.advice import (
    COLLAPSED,
    CUT_OFF,
    LARGE_UPDATES,
    MORE_SIGNAL,
    NEARER,
    TIME,
    TOO_OLD,
    advice,
)
from rlhf3d.observability.page.verdict import judge


@pytest.mark.parametrize(
    ("group", "key", "changed"),
    [
        ("training", "ppo_epochs", {"epochs": 3}),
        ("training", "ppo_micro_batch_size_per_gpu", {"micro_batches": 4}),
        ("training", "actor.layout.pp", {"stages": 2, "micro_batches": 2}),
        ("training", "use_remove_padding", {"packed": False}),
        ("generation", "max_num_seqs", {"decoded_at_once": 16, "sequences": 32}),
        ("generation", "max_staleness", {"max_staleness": 0}),
        ("generation", "rollout.engines)", {"on_cpu": False}),
        ("validation", "test_freq", {"test_freq": 8}),
        ("checkpoints", "save_freq", {"save_freq": 5}),
        ("checkpoints", "async_save", {"async_save": False}),
    ],
)
def test_what_is_done_already_is_not_advised(group: str, key: str, changed: dict) -> None:
    done = setup()
    assert key not in advice(TIME[group], done)
    assert key in advice(TIME[group], replace(done, **changed))


@pytest.mark.parametrize(
    ("hints", "key", "changed"),
    [
        (NEARER, "use_kl_loss", {"kl_term": False}),
        (NEARER, "updates a batch", {"mini_batches": 4}),
        (COLLAPSED, "use_kl_loss", {"kl_term": False}),
        (MORE_SIGNAL, "filter_groups", {"dynamic_sampling": False}),
        (TOO_OLD, "max_staleness", {"max_staleness": 2}),
        (CUT_OFF, "overlong_buffer", {"overlong_penalty": False}),
    ],
)
def test_so_for_what_is_not_healthy(hints: tuple, key: str, changed: dict) -> None:
    done = replace(setup(), max_staleness=0, overlong_penalty=True)
    assert key not in advice(hints, done)
    assert key in advice(hints, replace(done, **changed))


def test_micro_batches_fill_the_pipeline() -> None:
    """Half as many must still be one for each stage."""
    for stages, count, possible in ((1, 1, False), (2, 2, False), (2, 4, True), (4, 4, False)):
        found = advice(TIME["training"], setup(stages=stages, micro_batches=count))
        assert ("larger micro-batches" in found.lower()) == possible


def test_packing_is_for_batches_with_padding() -> None:
    rows = [{**row, "perf/padding_share/update_actor": 0.03} for row in healthy_rows(20)]
    assert "packed" not in advice(TIME["training"], setup(packed=False), rows)


@pytest.mark.parametrize(
    ("stages", "parts", "count", "bubble"), [(2, 1, 2, 1 / 3), (2, 2, 2, 1 / 5), (1, 1, 1, 0)]
)
def test_the_bubble_of_a_pipeline(stages: int, parts: int, count: int, bubble: float) -> None:
    found = setup(stages=stages, stage_parts=parts, micro_batches=count).bubble
    assert found == pytest.approx(bubble)


def test_what_is_set_now_is_named() -> None:
    assert advice(CUT_OFF, setup()).startswith("Raise data.max_response_length (now 20)")
    found = advice(LARGE_UPDATES, setup(epochs=3, max_staleness=2))
    assert found == (
        "A lower learning rate, fewer epochs a batch (actor.ppo_epochs, critic.ppo_epochs; now 3), "
        "or a smaller rollout.max_staleness (now 2)."
    )
    assert advice((), setup()) == ""


def test_a_value_model_that_costs_much_and_explains_little() -> None:
    costs = {"timing_s/values": 8.0, "timing_s/update_critic": 20.0, "timing_s/step": 70.0}
    rows = [{**row, **costs, "critic/vf_explained_var": 0.03} for row in healthy_rows(30)]
    found = judge(rows, setup(completions_per_prompt=2)).bound
    assert "(values + update_critic) takes 40 % of a step and explains 3 %" in found.advice
    assert "rollout.n is 2" in found.advice
    useful = [{**row, "critic/vf_explained_var": 0.5} for row in rows]
    assert "value model" not in judge(useful, setup()).bound.advice


def test_what_the_run_cannot_say_is_said() -> None:
    """Groups where nothing compares them; the engine against a trainer that computes nothing."""
    rows = healthy_rows(30)
    for row in rows:
        del row["training/rollout_probs_diff_mean"]
    found = {check.title: check.level for check in judge(rows, setup(needs_groups=False)).checks}
    assert not any("Groups" in title for title in found)
    found = {check.title: check.level for check in judge(rows, setup(old_from_engine=True)).checks}
    assert found["Engine against trainer is not measured"] == "unknown"
    assert found["Groups have something to learn from"] == "good"


def test_what_is_cut_off_may_be_scored_wrongly() -> None:
    rows = [{**row, "response/truncated_ratio": 0.6} for row in healthy_rows(30)]
    texts = [judge(rows, setup(scores_last_number=last)).checks[0].text for last in (True, False)]
    assert ["last number" in text for text in texts] == [True, False]
