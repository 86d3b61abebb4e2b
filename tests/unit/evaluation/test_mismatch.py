"""`rlhf3d doctor mismatch`: from the files of a run to words, tables and exit codes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.evaluation.mismatch import examine
from rlhf3d.observability.mismatch.pairs import read_pairs
from rlhf3d.observability.mismatch.summary import CONTEXT
from rlhf3d.observability.tokens import TokenSpan, TrajectoryTokens, write_tokens

PROMPT = TokenSpan("prompt", [1, 2], ["2+3", "?"])


def said(
    engine: list[float | None], trainer: list[float | None] | None, version: int = 0
) -> TokenSpan:
    count = len(engine)
    texts = [f"t{place}" for place in range(count)]
    versions = [[0, version]]
    return TokenSpan("sampled", list(range(count)), texts, versions, 0.0, engine, trainer)


def trajectory(number: int, *spans: TokenSpan, trained: int | None = 0) -> TrajectoryTokens:
    rows = [[PROMPT, *spans]]
    return TrajectoryTokens(number, 0, "math", 1.0, "scored", "stop", rows, trained)


def write_run(folder: Path, off: float, configuration: str = "") -> Path:
    """Eight answers of twenty tokens on which both sides part by up to `off`, either way."""
    rng = random.Random(0)
    found = []
    for number in range(8):
        trainer = [-rng.expovariate(0.5) for _ in range(20)]
        engine = [logprob + rng.uniform(-off, off) for logprob in trainer]
        found.append(trajectory(number, said(engine, trainer)))
    write_tokens(folder, 1, found)
    if configuration:
        (folder / "config.yaml").write_text(configuration)
    return folder


def doctor(*arguments: object) -> Any:
    command = ["doctor", "mismatch", *map(str, arguments)]
    return CliRunner().invoke(cli.app, command, env={"COLUMNS": "200"})


def test_pairs_have_their_places(tmp_path: Path) -> None:
    tool = TokenSpan("environment", [7, 8, 9], ["a", "b", "c"])
    first, second = said([-1.0, -2.0], [-1.5, -2.0]), said([-3.0, None], [-3.0, -1.0], version=4)
    write_tokens(tmp_path, 5, [trajectory(0, first, tool, second, trained=5)])
    pairs = read_pairs(tmp_path)
    assert pairs.difference.tolist() == [0.5, 0.0, 0.0] and pairs.not_finite == 1
    assert pairs.position.tolist() == [2, 3, 7] and pairs.place.tolist() == [0, 1, 5]
    assert pairs.turn.tolist() == [0, 0, 1] and pairs.row_length.tolist() == [9, 9, 9]
    assert pairs.age.tolist() == [5, 5, 1]
    assert pairs.texts[0].texts[pairs.position[2]] == "t0"


def test_a_healthy_run(tmp_path: Path) -> None:
    config = "model: {path: nowhere}\ndata: {train_files: [rows.parquet]}\n"
    done = doctor(write_run(tmp_path, 0.05, config))
    assert done.exit_code == 0, done.output
    assert "healthy. Within rounding of bfloat16" in done.output
    assert "taken for one without experts" in done.output
    assert "The worst tokens" not in done.output


def test_a_run_with_a_cause(tmp_path: Path) -> None:
    done = doctor(write_run(tmp_path, 3.0))
    assert done.exit_code == 1, done.output
    assert "1. Both sides compute with other weights" in done.output
    assert "no config.yaml" in done.output and "The worst tokens" in done.output
    data = json.loads(doctor(tmp_path, "--json").stdout)
    assert data["verdict"] == "cause" and data["causes"][0]["kind"] == "wrong_weights"
    assert data["settings"]["precision"] == "bfloat16"


def test_every_token_is_in_one_line_of_each_table(tmp_path: Path) -> None:
    summary = examine(write_run(tmp_path, 0.5)).summary
    for name, lines in summary.tables.items():
        assert sum(line.figures.tokens for line in lines) == summary.all.tokens == 160, name
    worst = summary.worst[0]
    assert abs(worst.engine - worst.trainer) == pytest.approx(summary.all.abs_max)
    before = ["2+3", "?", *(f"t{place}" for place in range(worst.position - 2))]
    assert worst.text == f"t{worst.position - 2}" and worst.before == "".join(before[-CONTEXT:])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (None, "trainer.sample_tokens"),
        ((said([-1.0], None),), "bypass_mode"),
        ((said([None], [-1.0]),), "no token has two finite log-probs"),
    ],
)
def test_a_run_without_pairs(
    tmp_path: Path, spans: tuple[TokenSpan, ...] | None, message: str
) -> None:
    if spans is not None:
        write_tokens(tmp_path, 1, [trajectory(0, *spans)])
    done = doctor(tmp_path)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_a_configuration_has_the_errors_of_train(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("rollout: {nn: 1}\n")
    asked = doctor(job, "actor.ppo_epoch=2")
    trained = CliRunner().invoke(cli.app, ["train", str(job), "actor.ppo_epoch=2"])
    assert isinstance(asked.exception, ValueError) and "rollout.n?" in str(asked.exception)
    assert str(asked.exception) == str(trained.exception)
    missing = tmp_path / "none.yaml"
    assert "none.yaml" in str(doctor(missing).exception)


def test_keys_of_a_run_cannot_be_changed(tmp_path: Path) -> None:
    changed = doctor(write_run(tmp_path, off=1e-6), "rollout.n=2")
    assert "not in a run" in str(changed.exception)
