"""What TRL's GRPO was given as a configuration of ours: defaults, sizes, files that are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.config.convert.apply import Conversion, apply, convert
from rlhf3d.config.convert.trl.read import Trl, read_trl
from rlhf3d.config.convert.trl.table import TRL
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import load_config

CORRECTION = "algorithm.rollout_correction."
COMMAND = """
set -e
lr=2e-6
accelerate launch --num_processes=4 --num_machines 2 train_mine.py \\
    --model_name_or_path org/m-1B --learning_rate $lr --use-vllm \\
    --num_generations 4 --beta ${BETA} --no_shuffle_dataset \\
    --reward_funcs accuracy_reward think_format_reward --reward_weights 1.0 0.5 2>&1 | tee log
"""
PROGRAM = '''
"""Mine.

Don't forget:

accelerate launch \\
    mine.py --num_generations 2
"""
rate = 3e-6
def shorter(completions, **kwargs): ...
trainer = GRPOTrainer(model="org/m-1B", reward_funcs=[shorter, accuracy_reward], train_dataset=rows,
                      {arguments})
'''


def made(**given: Any) -> Conversion:
    """A conversion of keys, with a model, on one process."""
    needed = {"model_name_or_path": "/models/m", "num_processes": 1}
    return convert(Trl(needed | given), TRL)


def read(path: Path, text: str, overrides: list[str] | None = None) -> Trl:
    path.write_text(text)
    return read_trl(path, overrides or [], {})


def test_every_key_of_ours_in_the_table_exists_and_none_of_theirs_is_in_two_rules() -> None:
    known = {key.name for key in all_keys()}
    assert [rule.to for rule in TRL.rules if rule.to not in {"", *known}] == []
    names: list[str] = []
    for rule in TRL.rules:
        names += rule.names
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_what_is_not_given_has_their_default() -> None:
    values = made().values
    expected = {
        "rollout.n": 8,
        # 8 completions a generation and an update, of one prompt.
        "data.train_batch_size": 1,
        "actor.ppo_mini_batch_size": 1,
        "actor.ppo_micro_batch_size_per_gpu": 8,
        "actor.optim.weight_decay": 0.0,
        "actor.optim.lr_decay_style": "linear",
        "actor.layout.recompute": "full",
        "actor.clip_ratio_c": 1e9,
        "algorithm.adv_estimator": "grpo",
        "trainer.total_epochs": 3,
        "trainer.seed": 42,
        "trainer.save_freq": 500,
        "trainer.test_freq": 0,
        "trainer.val_before_train": False,
        "trainer.logger": [],
    }
    assert expected.items() <= values.items()
    # Token means of the mini-batch, no KL: so it is here without a key.
    assert not {"actor.loss_agg_mode", "actor.use_kl_loss"} & values.keys()
    # Without vLLM nothing is corrected.
    assert not any(name.startswith(CORRECTION) for name in values)


def test_sizes_and_steps() -> None:
    values = made(
        num_processes=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_generations=8,
        num_iterations=2,
        max_steps=800,
        warmup_steps=16,
        save_steps=80,
        eval_strategy="steps",
        eval_steps=40,
    ).values
    # 128 completions a generation, 32 an update: four updates, twice.
    assert (values["data.train_batch_size"], values["actor.ppo_mini_batch_size"]) == (16, 4)
    assert values["trainer.total_training_steps"] == 100
    assert values["actor.optim.lr_warmup_steps"] == 2
    assert values["trainer.save_freq"] == 10
    assert values["trainer.test_freq"] == 5
    assert (values["validation.greedy"], values["validation.sampled_n"]) == (False, 8)
    assert (values["actor.layout.dp"], values["actor.ppo_epochs"]) == (4, 2)


def test_a_generation_of_parts_of_a_prompt_is_named() -> None:
    conversion = made(per_device_train_batch_size=4, num_generations=8)
    notes = [item.note for item in conversion.findings if item.became == "differs"]
    assert any("4 completions, 8 a prompt" in note for note in notes)


def test_the_number_of_processes_is_asked_for() -> None:
    conversion = convert(Trl({"model_name_or_path": "/models/m"}), TRL)
    assert any("num_processes=N" in text for text in conversion.to_set)


@pytest.mark.parametrize(
    ("loss", "level", "ours"),
    [
        ("dapo", "token", (None, None)),
        ("grpo", "sequence", ("gspo", "seq-mean-token-mean")),
        ("dr_grpo", "token", (None, "seq-mean-token-sum-norm")),
        ("bnpo", "token", (None, None)),
        ("cispo", "token", ("cispo", None)),
    ],
)
def test_losses(loss: str, level: str, ours: tuple[str | None, str | None]) -> None:
    values = made(loss_type=loss, importance_sampling_level=level, epsilon_high=5.0).values
    assert (values.get("actor.policy_loss"), values.get("actor.loss_agg_mode")) == ours
    if loss == "cispo":
        assert (values["actor.clip_ratio_low"], values["actor.clip_ratio_high"]) == (1.0, 4.0)


def test_the_largest_ratio_of_cispo_is_asked_for() -> None:
    # TRL's default, 0.2, would cut every ratio.
    assert any("cuts all ratios at 0.2" in text for text in made(loss_type="cispo").to_set)


def test_a_loss_that_is_not_offered_is_refused_by_name() -> None:
    assert any("must be one of vanilla" in text for text in made(loss_type="sapo").to_set)


@pytest.mark.parametrize(("correct", "kind"), [(True, "low_var_kl+"), (False, None)])
def test_kl(correct: bool, kind: str | None) -> None:
    values = made(beta=0.04, use_bias_correction_kl=correct).values
    assert (values["actor.use_kl_loss"], values["actor.kl_loss_coef"]) == (True, 0.04)
    assert values.get("actor.kl_loss_type") == kind


@pytest.mark.parametrize(
    ("mode", "ours"),
    [
        ("sequence_mask", ("sequence", "1e-09_3")),
        ("token_truncate", ("token", 3.0)),
    ],
)
def test_importance_sampling_of_the_engine(mode: str, ours: tuple[str, Any]) -> None:
    values = made(use_vllm=True, vllm_importance_sampling_mode=mode).values
    found = values[CORRECTION + "rollout_is"], values[CORRECTION + "rollout_is_threshold"]
    assert found == ours
    off = made(use_vllm=True, vllm_importance_sampling_correction=False)
    assert not any(name.startswith(CORRECTION) for name in off.values)


def test_a_command_line_in_a_script(tmp_path: Path) -> None:
    trl = read(tmp_path / "run.sh", COMMAND, ["num_iterations=2"])
    assert trl.values == {
        "num_processes": 4,
        "num_machines": 2,
        "model_name_or_path": "org/m-1B",
        "learning_rate": 2e-6,
        "use_vllm": True,
        "num_generations": 4,
        "shuffle_dataset": False,
        "reward_funcs": ["accuracy_reward", "think_format_reward"],
        "reward_weights": [1.0, 0.5],
        "num_iterations": 2,
    }
    assert trl.unknown == {"beta": "${BETA}"}
    values = convert(trl, TRL).values
    assert values["reward.weights"] == {"accuracy": 1.0, "format": 0.5}
    assert values["reward.format"] == "think"
    assert (values["cluster.num_nodes"], values["cluster.gpus_per_node"]) == (2, 2)


def test_a_configuration_that_a_script_names(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text("learning_rate: 1e-5\nnum_generations: 4\n")
    trl = read(tmp_path / "run.sh", "trl grpo --config grpo.yaml --num_generations 16\n")
    assert (trl.values["learning_rate"], trl.values["num_generations"]) == (1e-5, 16)


def test_a_program_is_read_and_not_run(tmp_path: Path) -> None:
    arguments = "args=GRPOConfig(learning_rate=rate, top_k=args.top_k, num_generations=4)"
    trl = read(tmp_path / "mine.py", PROGRAM.replace("{arguments}", arguments))
    assert trl.values == {
        "model_name_or_path": "org/m-1B",
        "reward_funcs": ["mine.py:shorter", "accuracy_reward"],
        "dataset_name": "rows",
        "learning_rate": 3e-6,
        "num_generations": 4,
    }
    assert trl.unknown == {"top_k": "args.top_k"}
    asked = convert(trl, TRL).to_set
    assert any("functions of your own" in text for text in asked)
    assert any("top_k = args.top_k" in text for text in asked)


def test_a_program_whose_text_shows_the_command(tmp_path: Path) -> None:
    trl = read(tmp_path / "mine.py", PROGRAM.replace("{arguments}", "args=training_args"))
    assert trl.values["num_generations"] == 2


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("run.sh", "echo hello\n", "no line calls TRL"),
        ("mine.py", "x = (\n", "is not Python"),
        ("mine.py", "x = 1\n", "no GRPOConfig is made"),
    ],
)
def test_a_file_without_trl_is_refused(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read(tmp_path / name, text)


@pytest.mark.parametrize("value", ["x", [1], -3, 0])
def test_a_value_of_the_wrong_kind_is_no_traceback(value: Any) -> None:
    for name in [rule.names[0] for rule in TRL.rules if rule.to and rule.names]:
        trl = Trl({"use_vllm": True, "eval_strategy": "steps", name: value})
        try:
            TRL.check_kinds(trl.values)
        except ValueError as error:
            assert name in str(error)
            continue
        for rule in TRL.rules:
            list(apply(rule, trl, TRL))


def test_the_command_writes_what_a_run_loads(tmp_path: Path) -> None:
    file, output = tmp_path / "grpo.yaml", tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "/models/m", "temperature": 0.9}))
    arguments = ["config", "from-trl", str(file), "--output", str(output), "num_processes=2"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2 and "data.train_files is empty" in done.stdout
    config = load_config(output, ["data.train_files=[a.parquet]"])
    assert (config.rollout.temperature, config.actor.layout.dp) == (0.9, 2)
