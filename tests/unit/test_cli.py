"""The command as a user meets it: in its own process, by exit code and output."""

from __future__ import annotations

import linecache
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.commands.errors import raised_by_us
from rlhf3d.config.keys import all_keys
from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.score import ScoreItem

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def rlhf3d(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf3d.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_is_quick() -> None:
    """Under a second of processor time (the wall clock depends on what else runs), best of
    three.
    """
    seconds = []
    for _ in range(3):
        before = os.times()
        assert rlhf3d("--help").returncode == 0
        after = os.times()
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    assert min(seconds) < 1.0


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "vllm", "megatron", "transformers", "numpy", "pyarrow"}
    code = (
        "import sys, rlhf3d.cli, rlhf3d.config.load, rlhf3d.preflight, rlhf3d.doctor\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_config_lists_every_key() -> None:
    text = CliRunner().invoke(cli.app, ["config"]).stdout
    missing = [
        doc.name for doc in all_keys() if f"{doc.name} = " not in text or doc.doc not in text
    ]
    assert missing == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_sound(path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["config", str(path)])
    assert done.exit_code == 0, done.exception
    assert yaml.safe_load(done.stdout)["model"]["path"].startswith("models/")


def test_quickstart_is_short() -> None:
    assert len((ROOT / "configs" / "quickstart.yaml").read_text().splitlines()) < 60


def test_a_mistake_is_one_screen_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rollout: {n: x}\ntrainer: {sed: 1}\n")
    done = rlhf3d("train", "run.yaml", "rollout.top_p=0.5", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 24
    for piece in (
        "rollout.n = 'x': expected int",
        "did you mean trainer.seed?",
        "rollout.top_p = 0.5",
    ):
        assert piece in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"], (
        "nothing half-written is left"
    )


def test_bad_arguments_exit_2() -> None:
    assert CliRunner().invoke(cli.app, ["train"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["nonsense"]).exit_code == 2
    done = rlhf3d("data", "prepare", "nonsense")
    assert done.returncode == 2
    assert "known are arithmetic" in done.stderr


def test_gpu_job_stops_in_preflight(tmp_path: Path) -> None:
    """With a folder of its own as working directory neither model nor data are there."""
    if cli_sees_gpu():
        pytest.skip("this machine has GPUs")
    done = rlhf3d("train", str(ROOT / "configs" / "math.yaml"), cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for piece in (
        "needs 8 GPUs",
        "found 0",
        "host memory: needs",
        "model.path",
        "data.train_files",
    ):
        assert piece in done.stderr
    assert list(tmp_path.iterdir()) == []


def cli_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_data_prepare_writes_both_splits(tmp_path: Path) -> None:
    output = tmp_path / "data"
    done = rlhf3d(
        "data",
        "prepare",
        "arithmetic",
        "--output",
        str(output),
        "--train-size",
        "12",
        "--test-size",
        "4",
        "--seed",
        "3",
    )
    assert done.returncode == 0, done.stderr
    assert "12 rows" in done.stdout
    assert sorted(path.name for path in output.iterdir()) == ["test.parquet", "train.parquet"]


def test_only_our_own_value_errors_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def library_fails() -> None:
        raise ValueError("deep inside a library")

    monkeypatch.setattr(cli, "app", library_fails)
    with pytest.raises(ValueError, match="deep inside"):
        cli.run()


def test_a_mistake_in_our_own_code_is_not_the_users() -> None:
    """Only what a `raise` of the package says is."""
    lines = {"compare": "x = int('a')\n", "refuse": "raise ValueError(\n    'batch size 3'\n)\n"}
    errors = {}
    for name, source in lines.items():
        path = str(Path(cli.__file__).with_name(f"{name}.py"))
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        with pytest.raises(ValueError) as caught:
            exec(compile(source, path, "exec"))
        errors[name] = raised_by_us(caught.value)
    assert errors == {"compare": False, "refuse": True}


def test_a_failing_reward_function_is_one_screen_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "reward.py"
    own.write_text("def compute_score(*args, **kwargs):\n    return 1 / 0\n")

    def score() -> None:
        function = load_custom_reward(own)
        with RewardManager(function, workers=1, timeout_s=20.0, max_error_rate=0.1) as manager:
            manager.score_batch([ScoreItem("t", "x", "1")] * 20)

    monkeypatch.setattr(cli, "app", score)
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "reward.max_error_rate" in error
    assert len(error.splitlines()) < 50
