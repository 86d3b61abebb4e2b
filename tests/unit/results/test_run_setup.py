"""How a run is set up, read from its `config.yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.results.run_setup import find_setup, setup_of

ROOT = Path(__file__).resolve().parents[3]


def with_lines(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


MODEL = "model: {path: m/Tiny-Instruct, dtype: float32}\ndata: {train_files: [data/sums/a.parquet]"


def test_of_a_run_in_a_line(tmp_path: Path) -> None:
    path = with_lines(
        tmp_path,
        f"{MODEL}, train_batch_size: 16}}\n"
        "actor: {layout: {pp: 2, dp: 2}, ppo_mini_batch_size: 16, ppo_micro_batch_size_per_gpu: 8,"
        " ppo_epochs: 2}\n"
        "rollout: {n: 2}\ncluster: {platform: cpu}\n",
    )
    found = setup_of(path)
    assert found.about == (
        "PPO (gae), Tiny-Instruct float32, sums/a.parquet, 16 prompts × 2, not asynchronous, "
        "CPU, 4 training ranks"
    )
    # 16 x 2 sequences over 2 replicas, 8 in each micro-batch.
    assert (found.micro_batches, found.mini_batches, found.epochs, found.stages) == (2, 1, 2, 2)
    assert not found.needs_groups and found.scores_last_number


@pytest.mark.parametrize(
    ("lines", "scoring", "last_number"),
    [
        ("", "the rule of the row's data source (reward.method flexible", True),
        ("reward: {method: strict}", "reward.method strict", False),
        (
            f"custom_reward_function: {{path: {ROOT}/examples/x.py, name: f}}",
            f"The score is `f` in {ROOT}/examples/x.py.",
            False,
        ),
        ("reward: {weights: {accuracy: 1.0, format: 0.5}}", "+ 0.5 × the form boxed.", True),
    ],
)
def test_what_gives_the_score(tmp_path: Path, lines: str, scoring: str, last_number: bool) -> None:
    found = setup_of(with_lines(tmp_path, f"{MODEL}}}\n{lines}\n"))
    assert scoring in found.scoring and found.scores_last_number == last_number


def test_a_file_that_cannot_be_used_is_no_setup(tmp_path: Path) -> None:
    assert find_setup(tmp_path) is None
    with_lines(tmp_path, "nonsense: 3")
    assert find_setup(tmp_path) is None


def test_what_an_own_estimator_needs_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('is not run')")
    lines = f"algorithm: {{adv_estimator: mine, custom_path: {tmp_path}/own.py}}"
    found = setup_of(with_lines(tmp_path, f"{MODEL}}}\n{lines}\n"))
    assert found.needs_groups is None and found.about.startswith("mine, ")
