"""The verdict on synthetic curves: what goes wrong is named, and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from support.page_runs import healthy_rows, setup, with_validation

from rlhf3d.observability.page.learning import learning
from rlhf3d.observability.page.verdict import judge

Row = dict[str, Any]


def changed(steps: int, change: Callable[[Row, float, random.Random], None], seed: int = 0) -> list:
    """A healthy run whose rows are changed; `change` is told how far the run is, 0 to 1."""
    rng = random.Random(seed + 100)
    rows = healthy_rows(steps, seed)
    for row in rows:
        change(row, row["step"] / steps, rng)
    return rows


def reward(curve: Callable[[float], float], noise: float = 0.04) -> Callable[..., None]:
    def change(row: Row, part: float, rng: random.Random) -> None:
        row["critic/score/mean"] = curve(part) + rng.gauss(0, noise)

    return change


def put(name: str, curve: Callable[[float], float | None]) -> Callable[..., None]:
    def change(row: Row, part: float, rng: random.Random) -> None:
        row[name] = curve(part)

    return change


def test_a_run_that_learns_in_good_health() -> None:
    verdict = judge(healthy_rows(200))
    assert [finding.level for _, finding in verdict.answers] == ["good", "good", "fact", "fact"]
    assert verdict.learning.title == "It is learning"
    assert verdict.bound.title == "Training limits it"
    assert {check.level for check in verdict.checks} == {"good"}


@pytest.mark.parametrize(
    ("curve", "level", "title"),
    [
        (lambda part: 0.1 + 0.5 * part, "good", "It is learning"),
        (lambda part: 0.3, "watch", "No learning to be seen"),
        (lambda part: 0.98, "watch", "There is little left to learn"),
        (lambda part: 0.5 - 0.4 * part, "bad", "The reward falls"),
        (lambda part: 0.3 + min(part, 0.5) - 1.0 * max(0.0, part - 0.5), "bad", "lost it"),
        # Half of a late fall is not most of what was gained.
        (lambda part: min(0.1 + part, 0.7), "good", "It is learning"),
    ],
)
def test_what_a_reward_curve_means(curve: Callable[[float], float], level: str, title: str) -> None:
    found = learning(changed(160, reward(curve)))
    assert found.level == level and title in found.title, found


def test_a_flat_run_is_seldom_called_anything_else() -> None:
    """Of 200 flat runs of three lengths."""
    titles = []
    for seed in range(200):
        steps = (24, 100, 400)[seed % 3]
        titles.append(learning(changed(steps, reward(lambda part: 0.3), seed)).title)
    wrong = [title for title in titles if title != "No learning to be seen"]
    assert len(wrong) <= 10, wrong


def test_few_steps_say_nothing_yet() -> None:
    assert learning([]).level == "unknown"
    assert learning([{"step": 0, "timing_s/step": 3.0}]).title == "Nothing trained yet"
    for steps in (1, 7, 12):
        found = learning(changed(steps, reward(lambda part: 0.3)))
        assert found.title == "Too early to say", (steps, found)


@pytest.mark.parametrize(
    ("accuracies", "curve", "level", "title"),
    [
        ((0.2, 0.3, 0.5), lambda part: 0.3, "good", "It is learning"),
        ((0.5, 0.4, 0.3), lambda part: 0.1 + part / 2, "bad", "gets worse on held-out"),
        ((0.5, 0.4, 0.3), lambda part: 0.3, "bad", "gets worse on held-out"),
        ((0.2, 0.6, 0.25), lambda part: 0.3, "watch", "better at step 80"),
        ((0.3, 0.3, 0.31), lambda part: 0.1 + part / 2, "watch", "held-out accuracy does not"),
        ((0.3, 0.3, 0.31), lambda part: 0.3, "watch", "No learning"),
        ((0.2, 0.3, 0.5), lambda part: 0.5 - part / 3, "watch", "reward is falling again"),
    ],
)
def test_held_out_accuracy_counts_more_than_the_reward(
    accuracies: tuple[float, ...], curve: Callable[[float], float], level: str, title: str
) -> None:
    rows = changed(160, reward(curve))
    for place, accuracy in zip((0, 79, 159), accuracies, strict=True):
        rows[place] = with_validation(rows[place], accuracy)
    found = learning(rows)
    assert (found.level, title in found.title) == (level, True), found


def test_a_reward_that_pays_for_something_else_is_said() -> None:
    rows = changed(160, reward(lambda part: 0.1 + part / 2))
    rows[0], rows[-1] = with_validation(rows[0], 0.5), with_validation(rows[-1], 0.3)
    assert "pays for something else" in learning(rows).text


def test_few_held_out_prompts_prove_nothing() -> None:
    rows = changed(160, reward(lambda part: 0.3))
    rows[0], rows[-1] = with_validation(rows[0], 0.4, 20), with_validation(rows[-1], 0.5, 20)
    assert learning(rows).level == "watch"


FLAT = reward(lambda part: 0.3)


@pytest.mark.parametrize(
    ("name", "curve", "level", "title"),
    [
        ("actor/entropy", lambda part: 1.2 * (1 - part) ** 3, "watch", "Entropy has collapsed"),
        ("actor/entropy", lambda part: 1.0 + 2 * part, "watch", "Entropy grows"),
        ("actor/kl_loss", lambda part: 0.01 + 3 * part**4, "watch", "runs away"),
        ("actor/pg_clipfrac", lambda part: 0.45, "watch", "Updates are large"),
        ("training/rollout_probs_diff_mean", lambda part: 0.03, "watch", "disagree"),
        ("training/rollout_probs_diff_mean", lambda part: 0.2, "bad", "disagree"),
        ("response/truncated_ratio", lambda part: 0.1 + 0.8 * part, "watch", "cut off"),
        ("reward/mixed_groups_share", lambda part: 0.1, "watch", "Few groups"),
        ("actor/grad_norm_ratio", lambda part: 9.0 if part > 0.98 else 1.0, "watch", "spikes"),
        ("actor/grad_norm", lambda part: 0.0, "bad", "no gradient"),
        ("actor/lr", lambda part: 0.0, "bad", "learning rate is 0"),
        ("critic/vf_explained_var", lambda part: -0.3, "watch", "value model misleads"),
        ("reward/outcome/timeout", lambda part: 1.0, "watch", "Scoring fails"),
        ("reward/outcome/error", lambda part: 30.0, "bad", "Scoring fails"),
        ("reward/outcome/unparsable", lambda part: 90.0, "watch", "cannot be read"),
        ("rollout/engine_restarts", lambda part: 2.0, "watch", "Engines died"),
        ("actor/skipped_steps", lambda part: 1.0, "watch", "not finite"),
    ],
)
def test_each_thing_that_goes_wrong_is_named_alone(
    name: str, curve: Callable[[float], float], level: str, title: str
) -> None:
    verdict = judge(changed(160, put(name, curve)))
    wrong = [check for check in verdict.checks if check.level in ("bad", "watch")]
    assert [(check.level, title in check.title) for check in wrong] == [(level, True)], wrong
    assert wrong[0].advice and verdict.healthy.level == level
    assert wrong[0].title in verdict.healthy.text


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("actor/entropy", lambda part: 1.2 * (1 - part) ** 3),
        ("actor/kl_loss", lambda part: 0.01 + 3 * part**4),
        ("response/truncated_ratio", lambda part: 0.1 + 0.8 * part),
    ],
)
def test_what_may_be_wanted_is_bad_where_nothing_is_learned(
    name: str, curve: Callable[[float], float]
) -> None:
    rows = changed(160, put(name, curve))
    rng = random.Random(1)
    for row in rows:
        FLAT(row, 0.0, rng)
    assert [check.level for check in judge(rows).checks].count("bad") == 1


@pytest.mark.parametrize(("end", "level"), [(0.1, "good"), (0.6, "unknown"), (4.0, "watch")])
def test_kl_of_few_steps_is_not_settled_unless_it_is_far(end: float, level: str) -> None:
    checks = judge(changed(15, put("actor/kl_loss", lambda part: end * part**4))).checks
    assert [one.level for one in checks if one.title.startswith("KL to the reference")] == [level]


def test_old_samples_and_long_answers_left_behind() -> None:
    def old(row: Row, part: float, rng: random.Random) -> None:
        row["training/off_policy/trajectory_staleness_worst/mean"] = 2.0
        row["training/off_policy/kl_k3"] = kl
        row["response_length_ratio/p90"] = left

    kl, left = 0.3, 1.0
    assert "Samples are too old" in judge(changed(60, old)).healthy.text
    kl, left = 0.001, 0.5
    assert "Long answers are left behind" in judge(changed(60, old)).healthy.text
    kl, left = 0.001, 1.0
    assert judge(changed(60, old)).healthy.level == "good"


def test_numbers_that_are_not_finite_are_no_values() -> None:
    rows = changed(60, put("actor/loss", lambda part: None if part > 0.5 else 0.1))
    for row in rows[30:]:
        row["nonfinite"] = ["actor/loss"]
    first = judge(rows).checks[0]
    assert first.level == "bad" and "the last at 60" in first.text
    # Undefined in every run's first steps.
    rows = healthy_rows(60)
    rows[0] |= {"nonfinite": ["actor/grad_norm_ratio"], "actor/grad_norm_ratio": None}
    assert judge(rows).healthy.level == "good"


def test_without_a_reference_the_distance_is_not_known() -> None:
    rows = healthy_rows(60)
    for row in rows:
        del row["actor/kl_loss"]
    unknown = [check for check in judge(rows).checks if check.level == "unknown"]
    assert ["not measured" in check.title for check in unknown] == [True]
    assert judge(rows).healthy.level == "good"


def test_what_takes_the_time() -> None:
    def slow(row: Row, part: float, rng: random.Random) -> None:
        row["timing_s/generate"], row["timing_s/step"] = 90.0, 120.0

    found = judge(changed(60, slow)).bound
    assert found.title == "Generation limits it" and "generation 90.0 s = 75 %" in found.text
    between = judge(changed(60, put("timing_s/step", lambda part: 200.0))).bound
    assert (
        between.title == "Time between the phases limits it" and "logs/driver.log" in between.advice
    )


@pytest.mark.parametrize(
    ("trainer", "engines", "title"),
    [
        (15.0, 0.1, "Generation limits it"),
        (0.0, 15.0, "Training limits it"),
    ],
)
def test_beside_training_it_counts_who_waits(trainer: float, engines: float, title: str) -> None:
    def beside(row: Row, part: float, rng: random.Random) -> None:
        row["async/trainer_waited_s"], row["async/engines_waited_s"] = trainer, engines
        row["async/overlap_share"], row["timing_s/generate"] = 0.8, trainer

    found = judge(changed(60, beside)).bound
    assert found.title == title and f"waits {trainer:.1f} s" in found.text


def test_odd_rows_do_no_harm() -> None:
    for rows in (
        [{"step": 0}],
        [{"step": 1}],
        [{"step": 1, "critic/score/mean": None, "nonfinite": ["critic/score/mean"]}],
        [{"step": step, "critic/score/mean": "odd", "actor/lr": True} for step in range(40)],
        healthy_rows(1),
        healthy_rows(2),
    ):
        assert len(judge(rows).answers) == 4


def steep_kl(steps: int) -> list[Row]:
    return changed(steps, put("actor/kl_loss", lambda part: 0.8 * part**2))


@pytest.mark.parametrize(("steps", "level"), [(16, "unknown"), (40, "watch")])
def test_a_large_kl_is_never_fine(steps: int, level: str) -> None:
    """With few steps it is not settled, since it begins at 0."""
    (found,) = [check for check in judge(steep_kl(steps)).checks if "KL" in check.title]
    assert (found.level, "too few" in found.text) == (level, level == "unknown")


def test_a_gradient_that_rises_is_named_though_it_has_no_spike() -> None:
    def check(curve: Callable[[float], float]) -> str:
        checks = judge(changed(60, put("actor/grad_norm", curve))).checks
        return next(one.text for one in checks if "gradient of the policy" in one.title)

    assert "It rose: in the first 6 steps" in check(lambda part: 1 + 4 * part)
    assert "rose" not in check(lambda part: 1 + part / 2)


def test_one_update_of_a_batch_is_no_check_of_its_size() -> None:
    rows = changed(30, put("actor/pg_clipfrac", lambda part: 0.0))
    titles = {
        age: [check.title for check in judge(rows, setup(max_staleness=age)).checks]
        for age in (0, 1)
    }
    assert "Updates are of a sound size" not in titles[0]
    assert "Updates are of a sound size" in titles[1]


@pytest.mark.parametrize(("end", "falls"), [(0.2, True), (0.6, False)])
def test_answers_that_are_cut_off_less_and_less(end: float, falls: bool) -> None:
    curve = put("response/truncated_ratio", lambda part: 0.6 + (end - 0.6) * part)
    found = judge(changed(60, curve), setup()).checks[0]
    assert found.title == "Many answers are cut off"
    assert ("It falls" in found.text) == falls == found.advice.startswith("If it falls no further")


@pytest.mark.parametrize(("cut", "told"), [(0.05, True), (0.14, False)])
def test_nine_of_ten_are_told_where_so_many_end(cut: float, told: bool) -> None:
    """A mean of p90s below the limit would contradict that more than a tenth reach it."""
    rows = changed(30, put("response/truncated_ratio", lambda part: cut))
    assert ("nine of ten" in judge(rows).wrote.text) == told


def test_what_is_not_settled_is_not_advised() -> None:
    costs = {"timing_s/values": 8.0, "timing_s/update_critic": 20.0, "timing_s/step": 70.0}
    little = {**costs, "critic/vf_explained_var": 0.03}
    advised = [
        "value model" in judge([{**row, **little} for row in healthy_rows(steps)]).bound.advice
        for steps in (16, 30)
    ]
    assert advised == [False, True]


def test_the_validation_before_the_first_step_is_told_too() -> None:
    rows = changed(16, put("timing_s/validate", lambda part: 20.0 if part == 1 else 0.0))
    first = {"step": 0, "timing_s/validate": 23.0, "timing_s/step": 23.0}
    assert "in 1 of 16 steps." in judge(rows).bound.text
    assert "in 1 of 16 steps (and before the first)." in judge([first, *rows]).bound.text


@pytest.mark.parametrize(("last", "told"), [(0.27, False), (0.0, True)])
def test_a_last_step_is_told_where_it_is_no_noise(last: float, told: bool) -> None:
    rows = changed(60, reward(lambda part: 0.3, noise=0.02))
    rows[-1]["critic/score/mean"] = last
    assert ("last step's alone" in learning(rows).text) == told
