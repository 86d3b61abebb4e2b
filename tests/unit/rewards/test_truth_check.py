"""Ground truths against their scorers: `data check` and the start of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tiny_models import make_tiny_tokenizer
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.data.dataset import PromptDataset
from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.prepare import prepare
from rlhf3d.data.rows import PromptRow
from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.scorers import BuiltinReward
from rlhf3d.rewards.truth_check import check_prompt_files
from rlhf3d.rewards.truth_warnings import training_warnings

EXCERPTS = Path(__file__).parents[2] / "data"


def row(question: str, truth: str = "4", source: str = "openai/gsm8k", **extra: Any) -> PromptRow:
    return PromptRow(
        source,
        [{"role": "user", "content": question}],
        "math",
        {"ground_truth": truth},
        {"question": question, **extra},
    )


def test_real_rows_pass(tmp_path: Path) -> None:
    prepare("math500", EXCERPTS / "math500_excerpt.jsonl", tmp_path)
    report = check_prompt_files([tmp_path / "test.parquet"], make_tiny_tokenizer(), 4096)
    (file,) = report.files
    marks = file.marks["HuggingFaceH4/MATH-500"]
    assert (file.rows, file.duplicates, file.overlong, file.problems, file.warnings) == (
        9,
        0,
        0,
        [],
        [],
    )
    assert (marks.truth_right, marks.solutions_right, marks.solutions, marks.misses) == (
        9,
        9,
        9,
        [],
    )
    assert sum(file.lengths.values()) == 9 and file.longest > 0 and report.answers_per_s is not None


def test_rows_for_a_reward_model_are_no_problem_and_told(tmp_path: Path) -> None:
    """Nothing grades them, no scorer is asked for; a run by a rule refuses them at its start."""
    path = tmp_path / "train.parquet"
    rows = [
        PromptRow("hh", [{"role": "user", "content": f"q{i}"}], "", {"style": "model"})
        for i in range(3)
    ]
    write_parquet(rows, path, {})
    (file,) = check_prompt_files([path], make_tiny_tokenizer(), 64).files
    assert file.problems == [] and file.marks["hh"].without_truth == 3
    assert file.warnings == [
        "hh: 3 of 3 rows have no ground truth: only a reward model or an environment can score them"
    ]
    prompts = PromptDataset([path], make_tiny_tokenizer(), 64)
    assert [prompt.ground_truth for prompt in prompts] == [None] * 3
    assert "3 of the questions looked at" in training_warnings(prompts, prompts, None, None)[0]
    reward = BuiltinReward("strict", ("hh",), {"hh": "gsm8k"})
    with (
        RewardManager(reward, timeout_s=30.0) as pool,
        pytest.raises(ValueError, match=r"no ground truth .* reward\.weights"),
    ):
        training_warnings(prompts, prompts, reward, pool)


def test_truths_and_solutions_without_full_marks_are_listed(tmp_path: Path) -> None:
    rows = [
        row("a", answer="#### 4"),
        row("b", "five", answer="#### 5"),
        row("c", "6", answer="#### 7"),
    ]
    write_parquet(rows, tmp_path / "t.parquet", {})
    (file,) = check_prompt_files([tmp_path / "t.parquet"]).files
    marks = file.marks["openai/gsm8k"]
    assert (marks.truths, marks.truth_right, marks.solutions, marks.solutions_right) == (2, 2, 2, 1)
    assert (
        marks.failed == 2
        and "2 of 6 answers were not scored (row 1: error on the truth" in file.problems[0]
    )
    assert "'five' is not one number" in file.problems[0]
    assert "1 of 2 worked solutions do not get full marks" in file.warnings[0]
    assert any(
        "row 2: solution of '6' gets 0 (scored, answer '7')" in miss for miss in marks.misses
    )


def test_a_data_source_without_scorer_is_a_problem_until_one_is_named(tmp_path: Path) -> None:
    write_parquet([row("a", source="mine")], tmp_path / "t.parquet", {})
    (problem,) = check_prompt_files([tmp_path / "t.parquet"]).problems
    assert "no scorer for data_source 'mine' (1 rows)" in problem
    assert check_prompt_files([tmp_path / "t.parquet"], scorers={"mine": "gsm8k"}).problems == []
    (tmp_path / "own.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info): return 0"
    )
    custom = check_prompt_files(
        [tmp_path / "t.parquet"], reward=load_custom_reward(tmp_path / "own.py")
    )
    assert custom.problems == [] and "do not get full marks" in custom.files[0].warnings[0]


def test_every_accepted_answer_is_tried_and_an_error_is_no_wrong_answer(tmp_path: Path) -> None:
    lists = [replace(row("a"), reward_model={"ground_truth": ["4", "8/2"]})]
    write_parquet(lists, tmp_path / "lists.parquet", {})
    (file,) = check_prompt_files([tmp_path / "lists.parquet"]).files
    assert (
        "8/2' is not one number" in file.problems[0] and file.marks["openai/gsm8k"].truth_right == 1
    )
    scored = check_prompt_files(
        [tmp_path / "lists.parquet"], scorers={"openai/gsm8k": "math_verify"}
    )
    assert scored.problems == [] and scored.files[0].marks["openai/gsm8k"].truths == 2
    (tmp_path / "own.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info): return no"
    )
    (file,) = check_prompt_files(
        [tmp_path / "lists.parquet"], reward=load_custom_reward(tmp_path / "own.py")
    ).files
    assert (
        "1 of 1 answers were not scored (row 0: error on the truth: NameError: name 'no'"
        in file.problems[0]
    )
    assert file.marks["openai/gsm8k"].misses == [] and file.warnings == []


def test_unusable_rows_are_counted_with_their_reason(tmp_path: Path) -> None:
    good = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "a"}],
        "reward_model": {"ground_truth": "1"},
    }
    rows = [good, {**good, "prompt": []}, {**good, "reward_model": {"ground_truth": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (file,) = check_prompt_files([tmp_path / "t.parquet"]).files
    assert (file.rows, file.unreadable_count) == (3, 2)
    assert (
        "row 1: prompt must be a list" in file.unreadable[0]
        and "row 2: reward_model" in file.unreadable[1]
    )
    assert "2 of 3 rows cannot be used" in file.problems[0]
    pq.write_table(
        pa.Table.from_pylist([{**good, "reward_model": {"ground_truth": b"1"}}]),
        tmp_path / "t.parquet",
    )
    (problem,) = check_prompt_files(
        [tmp_path / "t.parquet"]
    ).problems  # and none that says there is no scorer
    assert (
        "row 0: reward_model.ground_truth: a built-in scorer compares text, numbers and lists"
        in problem
    )


def test_the_command_prints_and_exits_2_on_problems(tmp_path: Path) -> None:
    write_parquet(
        [row("a"), row("b")],
        tmp_path / "good.parquet",
        {"name": "mine", "dropped": {"too silly": 3}},
    )
    write_parquet([row("a", "four")], tmp_path / "bad.parquet", {})
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = [
        "data",
        "check",
        "--tokenizer",
        str(tmp_path / "model"),
        "--max-prompt-length",
        "100",
    ]
    good = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "good.parquet")])
    assert good.exit_code == 0, good.output
    for piece in (
        "2 rows",
        "3 rows of its source were dropped: too silly",
        "prompt tokens up to",
        "2 of 2",
    ):
        assert piece in " ".join(good.output.split())
    bad = CliRunner().invoke(cli.app, ["data", "check", "--json", str(tmp_path / "bad.parquet")])
    assert bad.exit_code == 2
    assert "'four' is not one number" in json.loads(bad.output)["problems"][0]
    with pytest.raises(ValueError, match="no such folder"):
        CliRunner().invoke(
            cli.app,
            [*arguments[:3], "nowhere", str(tmp_path / "good.parquet")],
            catch_exceptions=False,
        )


def test_training_says_what_the_check_would(tmp_path: Path) -> None:
    def dataset(name: str, *rows: PromptRow) -> PromptDataset:
        write_parquet(rows, tmp_path / name, {})
        return PromptDataset([tmp_path / name], make_tiny_tokenizer(), 64)

    reward = BuiltinReward("flexible", ("openai/gsm8k",))
    train = dataset("train.parquet", row("a"), row("b", "five"))
    with RewardManager(reward, timeout_s=10.0) as pool:
        assert (
            training_warnings(
                dataset("clean.parquet", row("a")), dataset("c.parquet", row("c")), reward, pool
            )
            == []
        )
        shared, refused = training_warnings(train, dataset("val.parquet", row("a")), reward, pool)
    broken = dataset(
        "broken.parquet", replace(row("c"), reward_model={"ground_truth": {"target": "4"}})
    )
    with (
        RewardManager(reward, timeout_s=10.0) as pool,
        pytest.raises(ValueError, match=r"the row that asks 'c': .* not dict"),
    ):
        training_warnings(broken, None, reward, pool)
    assert "1 of the questions looked at are in data.train_files and in data.val_files" in shared
    assert "1 of 3 ground truths looked at" in refused and "'five'" in refused
    assert [r.reward_model["ground_truth"] for r in train.sample(1)] == ["4"] and len(
        train.sample(5)
    ) == 2
