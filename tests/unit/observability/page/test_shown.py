"""What a page shows beside curves: bands, times, picked answers, words about the run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.page_runs import healthy_rows, sample, setup, with_validation, write_rows

from rlhf3d.observability.outcome import RunRecord
from rlhf3d.observability.page.answers import groups_by_step
from rlhf3d.observability.page.charts import CHARTS, curves, held_out_curves
from rlhf3d.observability.page.collect import Planned, PlannedMemory, RunFacts, RunView, collect
from rlhf3d.observability.page.learning import learning
from rlhf3d.observability.page.render import chart_data
from rlhf3d.observability.page.tables import (
    excerpts,
    in_words,
    memory_table,
    phase_table,
    summary,
)
from rlhf3d.observability.samples import write_samples

Row = dict[str, Any]


def view(folder: Path, rows: list[Row], facts: RunFacts | None = None) -> RunView:
    write_rows(folder, rows)
    return collect(folder, "run", rows, facts or RunFacts())


def test_a_card_and_its_curve_have_the_same_number() -> None:
    rows = healthy_rows(60)
    (line,) = curves(next(chart for chart in CHARTS if chart.id == "reward"), rows)
    expected = math.fsum(row["critic/score/mean"] for row in rows[-6:]) / 6
    assert line.now == line.mean[-1] == pytest.approx(expected, rel=1e-3)
    assert (
        f"and {expected:.3g} ± " in learning(rows).text and "in the last 6" in learning(rows).text
    )


@pytest.mark.parametrize(
    ("chart", "metric", "values"),
    [
        ("cut", "response/truncated_ratio", (1.0, 0.0)),
        ("waits", "async/trainer_waited_s", (30.0, 0.0)),
        ("length", "response_length/mean", (0.0, 9.0)),
    ],
)
def test_bands_hold_possible_values_only(
    chart: str, metric: str, values: tuple[float, float]
) -> None:
    rows = [{"step": step, metric: values[step % 3 == 0]} for step in range(1, 20)]
    (line,) = curves(next(one for one in CHARTS if one.id == chart), rows)
    lows = [low for low in line.low if low is not None]
    highs = [high for high in line.high if high is not None]
    assert min(lows) >= 0
    assert max(highs) <= (1 if chart == "cut" else 40)
    assert all(
        low <= mean <= high for low, mean, high in zip(lows, line.mean[1:], highs, strict=True)
    )


def test_held_out_bands_are_one_standard_error() -> None:
    (line,), format_ = held_out_curves([with_validation(healthy_rows(1)[0], 0.2, 100)])
    assert format_ == "share"
    assert (line.low, line.high) == ([pytest.approx(0.16)], [pytest.approx(0.24)])


def test_ages_and_rates_have_no_running_mean() -> None:
    name = "training/off_policy/trajectory_staleness_worst"
    rows = [{"step": step, f"{name}/mean": min(step - 1, 1)} for step in range(1, 9)]
    (line,) = curves(next(one for one in CHARTS if one.id == "staleness"), rows)
    assert not line.mean and not line.low and line.raw == [0, *[1] * 7]


def test_times_of_like_with_like(tmp_path: Path) -> None:
    """What only some steps have, and what goes on beside, is not in a usual step."""
    rows = healthy_rows(20)
    for row in rows:
        row["timing_s/generate"], row["async/drawn_s"] = 0.0, 33.0
        row["async/overlap_share"] = 1.0
        row["timing_s/update_actor"], row["timing_s/step"] = 20.0, 30.0
    rows[9] |= {"timing_s/validate": 40.0, "timing_s/step": 70.0}
    rows[19] |= {"timing_s/validate": 60.0, "timing_s/step": 90.0}
    planned = {"update_actor": 16.0, "ref_logprobs": 2.0, "generate": 4.0}
    facts = RunFacts(plan=Planned(planned, 22.0, [], 1.0, "laptop"))
    table = {row.name: row for row in phase_table(view(tmp_path, rows, facts))}
    step = table["complete step"]
    assert (step.measured, step.planned) == (30.0, None)
    together = table["those with a plan, together"]
    assert (together.measured, together.planned) == (23.0, 18.0)
    assert table["validate, in 2 of 20 steps"].measured == 50.0
    beside = table["generate, beside training"]
    assert (beside.measured, beside.planned, beside.alike) == (33.0, 4.0, False)
    assert table["update_actor"].share == pytest.approx(20 / 30)
    text = view(tmp_path / "again", rows).verdict.bound.text
    assert "A step takes 30.0 s (mean of the last 5, without validation and checkpoints)" in text
    assert "validation 50.0 s in 2 of 20 steps" in text and "takes 33.0 s a step" in text


def test_answers_worth_a_look(tmp_path: Path) -> None:
    cut = replace(sample("p", "right, but cut", 1.0, 50), finish_reason="length")
    failed = replace(sample("q", "none", 0.0), outcome="timeout")
    bad, good = sample("p", "bad", -1.0), sample("q", "good", 1.0)
    write_samples(tmp_path, 3, [cut, bad, good, failed])
    (at,) = groups_by_step(tmp_path)
    found = {pick.title: [group.answers[0].text for group in pick.groups] for pick in at.picks}
    assert found == {
        "the lowest scores": ["bad"],
        "rewarded, though cut off": ["right, but cut"],
        "without a score": ["none"],
        "the longest": ["right, but cut", "bad", "good", "none"],
    }
    assert [group.first for group in at.groups] == [0, 2]
    assert [answer.read for answer in at.groups[1].answers] == ["good", "none"]


def test_the_card_of_what_it_wrote_shows_answers(tmp_path: Path) -> None:
    for step, text in ((0, "before"), (9, "after" + "r" * 500)):
        write_samples(tmp_path, step, [sample("held out?", text, 0.0)], "greedy")
    write_samples(tmp_path, 9, [sample("p", "good", 1.0), sample("p", "bad", 0.0)])
    before, after, low = excerpts(view(tmp_path, healthy_rows(9)))
    assert (before.about, before.prompt, before.text) == ("step 0, score 0", "held out?", "before")
    assert after.about.startswith("the same, step 9") and after.text.endswith("r …")
    assert low.text == "bad" and "lowest of step 9" in low.about


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "4 s"), (1154, "19 min 14 s"), (7384, "2 h 3 min")]
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_the_first_lines_say_what_the_run_is(tmp_path: Path) -> None:
    facts = RunFacts(starts=[(0, "")], record=RunRecord(40), setup=setup())
    told = summary(view(tmp_path, healthy_rows(9), facts))
    assert told["about"] == "PPO (gae), tiny float32." and told["memory_missing"]
    assert told["line"].startswith("Steps 1 to 9 of 40 in ")
    assert told["line"].endswith(", never resumed.")
    assert memory_table(view(tmp_path / "again", healthy_rows(2), facts)) == []


def test_words_fit_where_the_old_policy_is_the_one_that_wrote(tmp_path: Path) -> None:
    charts = {}
    for engine in (True, False):
        known = RunFacts(setup=setup(old_from_engine=engine, needs_groups=engine))
        run = view(tmp_path / str(engine), healthy_rows(9), known)
        charts[engine] = {chart["id"]: chart for chart in chart_data([run])}
    for name in ("clip", "ppo_kl"):
        assert "the one that wrote" in charts[True][name]["help"]
        assert "the one that wrote" not in charts[False][name]["help"]
    # The limit is one for estimators that compare completions.
    assert charts[True]["signal"]["limit"] and charts[False]["signal"]["limit"] is None
    healthy = ["Healthy" in charts[engine]["signal"]["help"] for engine in (True, False)]
    assert healthy == [True, False]


@pytest.mark.parametrize("age", [0, 1])
def test_charts_that_must_be_flat_say_so_and_have_no_limit(tmp_path: Path, age: int) -> None:
    run = view(tmp_path, healthy_rows(9), RunFacts(setup=setup(max_staleness=age)))
    chart = next(one for one in chart_data([run]) if one["id"] == "clip")
    assert (chart["limit"] is None) == ("one update a batch" in chart["help"]) == (age == 0)
    assert ("Healthy" in chart["help"]) == (age == 1)
    throughput = next(one for one in chart_data([run]) if one["id"] == "throughput")
    assert ("shares the machine" in throughput["help"]) == (age == 1)


@pytest.mark.parametrize(("score", "shown"), [(1.0, "second"), (0.0, "first")])
def test_a_prompt_that_turned_right_is_shown_before_others(
    tmp_path: Path, score: float, shown: str
) -> None:
    for step, second in ((0, 0.0), (9, score)):
        found = [sample("first", "x", 0.0), sample("second", "x", second)]
        write_samples(tmp_path, step, found, "greedy")
    before, _ = excerpts(view(tmp_path, healthy_rows(9)))
    assert (before.prompt, "turned right" in before.about) == (shown, score == 1.0)


def test_what_the_fullest_rank_has_is_of_no_named_rank(tmp_path: Path) -> None:
    rows = [{**row, "perf/rank_memory_gib": 3.5} for row in healthy_rows(3)]
    places = [PlannedMemory("ranks 0 to 1", "update_actor", 3.9), PlannedMemory("rank 2", "", 3.0)]
    table = memory_table(view(tmp_path, rows, RunFacts(plan=Planned({}, 1.0, places, 9.0, "x"))))
    measured = {row.place: (row.planned, row.measured) for row in table}
    assert measured == {
        "ranks 0 to 1": (3.9, None),
        "rank 2": (3.0, None),
        "fullest training rank": (3.9, 3.5),
        "host": (9.0, None),
    }
