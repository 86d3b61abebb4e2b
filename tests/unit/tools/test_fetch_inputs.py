"""What `make train-7b` downloads: what the configuration names, the project knows and this machine
lacks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from rlhf3d.config.load import load_config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, in an empty folder."""
    spec = importlib.util.spec_from_file_location("fetch_inputs", ROOT / "tools/fetch_inputs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def commands(tool: ModuleType, name: str, *overrides: str) -> list[str]:
    config = load_config(ROOT / "configs" / name, overrides)
    return [" ".join(command) for command in tool.missing(config)]


def test_all_that_is_missing(tool: ModuleType) -> None:
    assert commands(tool, "math.yaml") == [
        "hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/Qwen2.5-7B-Instruct --exclude "
        "original/*",
        "rlhf3d data prepare math --source hub",
        "rlhf3d data prepare math500 --source hub",
    ]
    assert commands(tool, "math_70b.yaml")[0].startswith(
        "hf download meta-llama/Llama-3.1-70B-Instruct "
    )


def test_test_problems_leave_the_training_file(tool: ModuleType) -> None:
    """They have to be there first."""
    data = [command for command in commands(tool, "limr.yaml") if "prepare" in command]
    assert data == [
        "rlhf3d data prepare math500 --source hub",
        "rlhf3d data prepare limr --source hub --exclude data/math500/test.parquet",
    ]


def test_nothing_that_is_here_or_is_the_users_own(tool: ModuleType) -> None:
    for file in (
        "models/Qwen2.5-7B-Instruct/config.json",
        "data/math/train.parquet",
        "data/math500/test.parquet",
    ):
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
    assert commands(tool, "math.yaml") == []
    own = ("model.path=/models/Qwen2.5-7B-Instruct", "data.train_files=[mine/math/train.parquet]")
    assert commands(tool, "math.yaml", *own) == []
    assert commands(tool, "math.yaml", "model.path=models/mine") == []
