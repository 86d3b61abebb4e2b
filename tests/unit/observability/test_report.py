"""The run report: real files from real rows, whole runs and partial ones, numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.observability.metrics import MetricsWriter, read_metrics
from rlhf3d.observability.page.learning import binomial_standard_error
from rlhf3d.observability.report import learning_table, make_report
from rlhf3d.observability.samples import Sample, write_samples

SAMPLE = Sample("2+3? <b>|", "it is\n4", "5", 0.0, "scored", 3, "stop", 0)


def step_metrics(reward: float) -> dict[str, Any]:
    return {
        "critic/score/mean": reward,
        "response_length/mean": 30.0,
        "actor/ppo_kl": 0.001,
        "actor/entropy": 1.0,
        "timing_s/generate": 4.0,
        "timing_s/update_actor": 12.0,
        "timing_s/step": 18.0,
    }


def accuracy(greedy: float) -> dict[str, float]:
    return {"val-core/arithmetic/acc/greedy": greedy, "val-aux/arithmetic/num_prompts": 100}


def write_run(folder: Path) -> None:
    with MetricsWriter(folder) as writer:
        writer.write(0, {**accuracy(0.2), "timing_s/validate": 6.0, "timing_s/step": 6.0})
        writer.write(1, step_metrics(0.1))
        writer.write(2, {**step_metrics(0.3), **accuracy(0.4)})
        writer.write(3, step_metrics(math.nan))
        writer.write(4, {**step_metrics(0.5), **accuracy(0.5), "timing_s/validate": 6.0})
    write_samples(folder, 0, [SAMPLE], "greedy")
    write_samples(folder, 4, [replace(SAMPLE, response="5", score=1.0)], "greedy")


def test_an_answer_without_a_score_is_not_shown_as_wrong(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_samples(tmp_path, 4, [replace(SAMPLE, response="5", outcome="error")], "greedy")
    assert "| [0] it is 4 | [error] 5 |" in make_report(tmp_path).read_text()


def test_names_are_no_markup(tmp_path: Path) -> None:
    source = "org/$\\frac$_{|set[v2]/acc/of/reward_model/x"
    with MetricsWriter(tmp_path) as writer:
        for step in (0, 1):
            writer.write(step, {f"val-core/{source}/acc/greedy": 0.5, "critic/score/mean": 0.5})
    text = make_report(tmp_path).read_text()
    cell = source.replace("|", "\\|")
    assert f"| {cell} | greedy | not recorded | 50.0% (step 0) | 50.0% (step 1) |" in text
    assert f"| {cell} greedy |" in text and "Held-out score of the reward model" not in text


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = make_report(tmp_path)
    assert path == tmp_path / "report.md"
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 20_000
    text = path.read_text()
    # 0.2: sqrt(.2*.8/100) = 4.0 points; 0.5: 5.0 points; together sqrt(16 + 25) = 6.4
    assert (
        "| arithmetic | greedy | 100 | 20.0 ± 4.0 % (step 0) | 50.0 ± 5.0 % (step 4) | +30.0 ± 6.4 "
        "|" in text
    )
    assert "Steps 0 to 4, 1.3 min." in text  # 6 + 4 * 18 = 78 s
    assert "| update_actor | 12.0 | 4 | 48 | 63% |" in text  # of 48 + 16 + 12 = 76 s
    assert "| validate | 6.0 | 2 | 12 | 16% |" in text
    assert "| 2+3? &lt;b>\\| | 5 | [0] it is 4 | [1] 5 |" in text
    assert learning_table(read_metrics(tmp_path)) in text


def test_learning_table_averages_since_the_row_above(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert learning_table(read_metrics(tmp_path)).splitlines() == [
        "| step | reward | length, tokens | arithmetic greedy | validate, s | generate, s | "
        "update_actor, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 0 | – | – | 20.0% | 6.0 | – | – |",
        "| 2 | 0.200 | 30 | 40.0% | – | 4.0 | 12.0 |",
        "| 4 | 0.500 | 30 | 50.0% | 6.0 | 4.0 | 12.0 |",
    ]


def test_partial_run_without_validation_or_samples(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 46):
            writer.write(step, {"critic/score/mean": 1.0})
    text = make_report(tmp_path).read_text()
    assert "The run has not validated." in text
    assert "The run has no timings." in text
    assert "not written held-out answers twice" in text
    assert (tmp_path / "curves.png").stat().st_size > 0
    rows = learning_table(read_metrics(tmp_path)).splitlines()[2:]
    assert len(rows) <= 21
    assert rows[-1].startswith("| 45 |")


def test_a_run_that_generates_ahead_says_who_waited(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step, share in ((1, 0.5), (2, 1.0)):
            waits = {"async/trainer_waited_s": 3.0 * step, "async/engines_waited_s": 0.2}
            writer.write(step, {**step_metrics(0.1), **waits, "async/overlap_share": share})
    text = make_report(tmp_path).read_text()
    assert "75%" in text and "4.5 s" in text and "0.2 s" in text


def test_one_validation_has_no_gain(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"val-core/a/b/acc/greedy": 0.25})
    assert (
        "| a/b | greedy | not recorded | 25.0% (step 0) | – | – |"
        in make_report(tmp_path).read_text()
    )


def test_a_reward_model_alone_has_a_table_of_its_own(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step, mean in ((0, -1.0), (5, 0.5)):
            writer.write(
                step,
                {
                    "val-core/hh/reward_model/greedy": mean,
                    "val-aux/hh/reward_model/greedy/se": 0.3 + step,
                },
            )
    text = make_report(tmp_path).read_text()
    assert "Only a reward model scored: nothing is right or wrong." in text
    assert (
        "| hh | greedy | -1.000 ± 0.300 (step 0) | 0.500 ± 5.300 (step 5) | +1.500 ± 5.308 |"
        in text
    )
    assert "| 5 | – | – | 0.500 |" in learning_table(read_metrics(tmp_path))


def test_folders_that_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        make_report(tmp_path)
    MetricsWriter(tmp_path).close()
    with pytest.raises(ValueError, match="no finished step yet"):
        make_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_binomial_standard_error() -> None:
    assert binomial_standard_error(0.5, 100) == pytest.approx(0.05)
    assert binomial_standard_error(1.0, 100) == 0.0


def test_runs_are_drawn_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of one name too, and one that has not validated; the picture shows each."""
    from rlhf3d.commands.results import compare

    write_run(tmp_path / "a" / "run")
    write_run(tmp_path / "b" / "run")
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    compare([tmp_path / "a" / "run"], alone)
    with MetricsWriter(tmp_path / "c") as writer:
        writer.write(1, step_metrics(0.9))
    compare([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"], both)
    assert (
        alone.read_bytes()[:4] == both.read_bytes()[:4] == b"\x89PNG"
        and alone.read_bytes() != both.read_bytes()
    )
    assert capsys.readouterr().out.split() == [str(alone), str(both)]
    with pytest.raises(ValueError, match="is not the folder of a run"):
        compare([tmp_path / "nothing"], alone)
