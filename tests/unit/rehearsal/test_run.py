"""A miniature on disk, and when two runs are the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.tiny_models import make_tiny_model

from rlhf3d.checkpoints.manifest import Manifest, infos_below, write_manifest
from rlhf3d.checkpoints.store import Store
from rlhf3d.config.load import ConfigError, load_config
from rlhf3d.data.parquet import read_parquet, write_parquet
from rlhf3d.data.rows import PromptRow
from rlhf3d.models.spec import load_reward_spec, load_spec
from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.samples import Sample, write_samples
from rlhf3d.rehearsal.run import differences, prepare
from rlhf3d.tokenizer.load import load_tokenizer


def write_job(folder: Path, **layout: int) -> Path:
    """A job whose model folder has its config alone, whose training file is here and whose
    validation file is not.
    """
    make_tiny_model(folder / "whole", "qwen3", layers=6, heads=8, kv_heads=4, hidden=256, vocab=999)
    (folder / "models" / "shape").mkdir(parents=True)
    (folder / "models" / "shape" / "config.json").write_bytes(
        (folder / "whole" / "config.json").read_bytes()
    )
    row = PromptRow(
        "openai/gsm8k",
        [{"role": "user", "content": "What is 2 + 3?"}],
        "math",
        {"ground_truth": "5"},
    )
    write_parquet([row] * 5, folder / "train.parquet", {})
    job = {
        "model": {"path": "elsewhere/shape"},
        "data": {
            "train_files": [str(folder / "train.parquet")],
            "val_files": ["elsewhere/test.parquet"],
        },
        "actor": {"layout": layout, "ppo_mini_batch_size": 32},
        "trainer": {"output_dir": "runs/real"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def test_a_miniature_needs_neither_weights_nor_data(tmp_path: Path) -> None:
    made = prepare(write_job(tmp_path, tp=4, pp=3, dp=1), [], tmp_path / "out", 16)
    config = load_config(made.config)
    spec = load_spec(config.model.path)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.vocab_size % 4) == (
        3,
        8,
        4,
        999 % 4,
    )
    assert config.trainer.output_dir == str(tmp_path / "out" / "run")
    (train,) = map(read_parquet, config.data.train_files)
    assert {row.data_source for row in train} == {"openai/gsm8k"} and len(
        train
    ) >= 2 * config.data.train_batch_size
    assert any("elsewhere/test.parquet: not here" in note for note in made.notes)
    tokenizer = load_tokenizer(config.model.path)
    assert len(tokenizer) <= spec.vocab_size and tokenizer.decode(tokenizer.encode("5 é")) == "5 é"


def test_what_is_wrong_with_the_job_is_told_in_its_own_numbers(tmp_path: Path) -> None:
    job = write_job(tmp_path, tp=8, pp=4, dp=1)
    with pytest.raises(
        ConfigError, match=r"num_key_value_heads 4 % tp 8 = 4.*num_hidden_layers 6 % pp 4 = 2"
    ):
        prepare(job, ["custom_reward_function.path=no.py"], tmp_path / "out", 16)
    with pytest.raises(
        ConfigError, match=r"custom_reward_function.path = no.py: no such Python file"
    ):
        prepare(job, ["custom_reward_function.path=no.py"], tmp_path / "out", 16)
    with pytest.raises(ValueError, match="which a rehearsal needs"):
        prepare(job, ["model.path=nowhere"], tmp_path / "out", 16)


def write_checkpoint(folder: Path, step: int) -> None:
    """A whole checkpoint as far as its files go."""
    store = Store(folder)
    partial = store.begin(step)
    (partial / "driver.json").write_text("{}")
    (partial / "config.yaml").write_text("model: {}")
    write_manifest(partial, Manifest(step, step, ("actor",), True, files=infos_below(partial, {})))
    store.publish(step, partial)


def test_a_reward_model_is_rehearsed_by_its_shape_alone(tmp_path: Path) -> None:
    job = write_job(tmp_path, tp=2)
    make_tiny_model(tmp_path / "judge", "llama", heads=4, kv_heads=2, layers=8)
    (tmp_path / "models" / "judge").mkdir()
    (tmp_path / "judge" / "config.json").rename(tmp_path / "models" / "judge" / "config.json")
    asked = [
        "reward.weights={reward_model: 1.0}",
        "reward_model.path=elsewhere/judge",
        "reward_model.layout.tp=2",
    ]
    config = load_config(prepare(job, asked, tmp_path / "out", 16).config)
    assert config.reward_model.path == str(tmp_path / "out" / "reward_model")
    assert load_reward_spec(config.reward_model.path).num_layers == 1
    with pytest.raises(
        ConfigError, match=r"reward_model.layout: TP3.* num_attention_heads 4 % tp 3 = 1"
    ):
        prepare(job, [*asked, "reward_model.layout.tp=3"], tmp_path / "out", 16)
    with pytest.raises(ValueError, match=r"reward_model.path: nowhere has no config.json"):
        prepare(job, [*asked, "reward_model.path=nowhere"], tmp_path / "out", 16)


def test_only_an_interrupted_run_of_the_same_miniature_goes_on(tmp_path: Path) -> None:
    job, out = write_job(tmp_path, tp=2), tmp_path / "out"

    def prepared(*overrides: str) -> bool:
        return prepare(job, list(overrides), out, 16).continues

    def run_to(*steps: int) -> None:
        for step in steps:
            write_checkpoint(out / "run" / "checkpoints", step)

    assert not prepared()
    (out / "run").mkdir()
    assert not prepared() and not (out / "run").exists()  # it has no checkpoint
    run_to(1)
    (out / "resumed").mkdir()
    assert prepared() and (out / "run").is_dir() and not (out / "resumed").exists()
    assert not prepared("trainer.resume_mode=never") and not (out / "run").exists()
    run_to(1)
    assert not prepared("rollout.n=2") and not (out / "run").exists()
    run_to(1, 2)
    assert not prepared("rollout.n=2") and not (out / "run").exists()


def test_runs_are_compared_by_all_but_seconds(tmp_path: Path) -> None:
    sample = Sample("2+3?", "5", "5", 1.0, "scored", 1, "stop", 2)

    def write(name: str, score: float, text: str = "5") -> Path:
        with MetricsWriter(tmp_path / name) as metrics:
            metrics.write(
                2,
                {
                    "critic/score/mean": score,
                    "timing_s/step": score,
                    "env/call_s/mean": score,
                    "critic/vf_explained_var": math.nan,
                },
            )
        write_samples(tmp_path / name, 2, [replace(sample, response=text)])
        return tmp_path / name

    first = write("first", 0.5)
    assert differences(first, write("same", 0.5), 2) == []
    assert differences(first, write("other", 0.75, "6"), 2) == [
        "critic/score/mean 0.5 and 0.75",
        "the completions",
    ]
    assert differences(first, tmp_path / "same", 3) == [f"{first} has no step 3"]
    row = json.loads((first / "metrics.jsonl").read_text())
    (first / "metrics.jsonl").write_text(json.dumps(row | {"actor/more": 1.0}) + "\n")
    assert differences(first, tmp_path / "same", 2) == ["actor/more is in one of them only"]
