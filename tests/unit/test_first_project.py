"""The first project of examples/: its data, environment and reward, through our own loaders."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
from support.environments import contents, reset, step
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.environments.load import Environments
from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.score import ScoreItem

PROJECT = Path(__file__).parents[2] / "examples" / "first_project"
FILES = ("config.yaml", "data.py", "environment.py", "reward.py")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in another folder, which is the working folder."""
    for file in FILES:
        shutil.copy(PROJECT / file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_small_and_the_page_shows_every_file() -> None:
    assert sum(len((PROJECT / file).read_text().splitlines()) for file in FILES) <= 60
    page = (PROJECT / "README.md").read_text()
    assert all(f"`{file}`" in page for file in FILES)


def test_the_check_of_its_readme_finds_nothing_wrong(copied: Path) -> None:
    runpy.run_path("data.py")
    options = ["--environment", "config.yaml", "--reward", "reward.py", "--json"]
    done = CliRunner().invoke(cli.app, ["data", "check", "train.parquet", "test.parquet", *options])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["problems"] == [] and [file["rows"] for file in report["files"]] == [80, 20]
    for file in report["files"]:
        assert file["warnings"] == [], file


def test_its_environment_answers_until_the_number_is_found() -> None:
    settings = EnvironmentConfig(path=str(PROJECT / "environment.py"), name="Guess")
    game = Environments(settings)
    reset(game, ground_truth="12")
    for guess, answer in (
        ("The number is 3.", "Higher."),
        ("From 1 to 20: 15", "Lower."),
        ("Which?", "Answer with one number."),
    ):
        reply = step(game, guess)
        assert (contents(reply.messages), reply.done) == ([answer], False)
    found = step(game, "It is 12.")
    assert (found.done, found.reward, found.record) == (True, None, {"guesses": 4})


def test_its_reward_falls_with_distance_and_guesses() -> None:
    reward = load_custom_reward(PROJECT / "reward.py")

    def scored(text: str, guesses: int) -> dict[str, float]:
        item = ScoreItem("secret_number", text, "12", environment={"guesses": guesses})
        return reward.score_items([item])[0]

    assert scored("It is 12.", 1) == {"score": 1.0, "acc": 1.0}
    assert scored("12", 3) == {"score": pytest.approx(0.81), "acc": 1.0}
    # A turn that is cut off never came to `step`.
    assert scored("12", 0) == scored("12", 1)
    assert scored("7", 1) == {"score": 0.75, "acc": 0.0}
    assert scored("1000", 1) == scored("no idea", 1) == {"score": 0.0, "acc": 0.0}
