"""verl configurations as ours: the table, scripts without a shell, what is said of each key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.config.convert import apply
from rlhf3d.config.convert.apply import Conversion, Finding
from rlhf3d.config.convert.shell import read_script
from rlhf3d.config.convert.verl.read import Verl, calls_verl, read_verl
from rlhf3d.config.convert.verl.table import VERL
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import load_config

RULES = VERL.rules
ROOT = Path(__file__).resolve().parents[3]
A, R = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
NEEDED = {"actor_rollout_ref.model.path": "/models/m", "data.train_files": "a.parquet"}
SCRIPT = """
set -x
size=$((1024 * 2))  # tokens (all)
mode="sync"
if [ "$mode" = "async" ]; then
    raw=True
else
    raw=False
fi
files="['$HOME/a.parquet', '$HOME/b.parquet']"
ENGINE=(
    actor_rollout_ref.rollout.n=${N:-$((2 * 4))}  # a comment (
    actor_rollout_ref.rollout.name=vllm
)
python3 -m verl.trainer.main_ppo --config-name='ppo_megatron_trainer'\\
    data.train_files="$files" data.max_response_length=$size \\
    data.train_batch_size=${batch_size} data.return_raw_chat=$raw \\
    actor_rollout_ref.model.path=${MODEL:-org/m-7B} "${ENGINE[@]}" \\
    +trainer.val_before_train=False $@
"""


def convert(verl: Verl) -> Conversion:
    return apply.convert(verl, VERL)


def made(**values: Any) -> Conversion:
    """A conversion of keys, __ for a dot, with a model and data."""
    return convert(
        Verl(NEEDED | {name.replace("__", "."): value for name, value in values.items()})
    )


def of(conversion: Conversion, name: str) -> Finding:
    return next(item for item in conversion.findings if item.name == name)


def actor(name: str, value: Any, **more: Any) -> Conversion:
    return convert(Verl(NEEDED | {A + name: value} | more))


def test_every_key_of_ours_in_the_table_exists() -> None:
    known = {key.name for key in all_keys()}
    assert [rule.to for rule in RULES if rule.to.removesuffix(".*") not in {"", *known}] == []


def test_no_key_of_verl_is_in_two_rules() -> None:
    names = [name for rule in RULES for name in rule.names]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_what_is_converted_is_loaded_by_the_loader_of_runs(tmp_path: Path) -> None:
    conversion = made(
        data__train_batch_size=256,
        algorithm__adv_estimator="grpo",
        actor_rollout_ref__rollout__n=8,
        actor_rollout_ref__actor__optim__lr=3e-6,
        trainer__nnodes=2,
    )
    file = tmp_path / "c.yaml"
    file.write_text(conversion.to_yaml())
    config = load_config(file)
    assert (config.data.train_batch_size, config.rollout.n) == (256, 8)
    assert config.actor.optim.lr == 3e-6
    # FSDP's replicas, and verl's default of two GPUs an engine, over 2 x 8 GPUs.
    assert (config.actor.layout.dp, config.rollout.engines) == (16, 8)
    assert conversion.to_set == []


def test_defaults_of_verl_that_are_not_ours_are_written() -> None:
    values = made().values
    assert values["data.train_batch_size"] == 1024
    assert values["trainer.total_epochs"] == 30
    # The same in both: not written.
    assert "data.max_prompt_length" not in values


@pytest.mark.parametrize(
    ("name", "value", "became"),
    [
        ("data.max_prompt_length", 512, "same by default"),
        ("data.max_prompt_length", 513, "converted"),
        (R + "multi_turn.enable", False, "same by default"),
        (R + "multi_turn.enable", True, "to set"),
        (R + "name", "sglang", "no counterpart"),
        ("actor_rollout_ref.model.lora_rank", 0, "same by default"),
        ("actor_rollout_ref.model.lora_rank", 32, "to set"),
        ("data.trian_batch_size", 1, "unknown"),
        ("trainer.total_training_steps", None, "same by default"),
        (A + "kl_loss_type", "low_var_kl", "same by default"),
        ("algorithm.adv_estimator", "rloo", "differs"),
    ],
)
def test_what_becomes_of_a_key(name: str, value: Any, became: str) -> None:
    assert of(convert(Verl(NEEDED | {name: value})), name).became == became


@pytest.mark.parametrize(
    ("rules", "limits", "ours"),
    [
        ("token_k1", "0.5_4.0", "0.25_2"),
        ("seq_max_k2", "2.5", "2.5"),
        ("token_k1,seq_max_k2", "0.5_4.0,2.5", "0.25_2,2.5"),
        ("token_k1", "2.0", "2.0"),
        # The old name bounded the ratio itself.
        ("token", "0.5_4.0", "0.5_4.0"),
    ],
)
def test_k1_bounds_the_ratio_and_not_its_inverse(rules: str, limits: str, ours: str) -> None:
    prefix = "algorithm.rollout_correction."
    given = {prefix + "rollout_rs": rules, prefix + "rollout_rs_threshold": limits}
    conversion = convert(Verl(NEEDED | given))
    assert str(conversion.values[prefix + "rollout_rs_threshold"]) == ours
    assert conversion.to_set == []


def test_engines_on_nodes_of_their_own() -> None:
    values = made(trainer__nnodes=2, actor_rollout_ref__rollout__nnodes=1).values
    assert values["rollout.placement"] == "disaggregated"
    assert (values["cluster.num_nodes"], values["rollout.engines"]) == (3, 4)


def test_an_unknown_key_is_named_with_the_nearest_one() -> None:
    conversion = made(data__trian_batch_size=1)
    assert "data.train_batch_size?" in of(conversion, "data.trian_batch_size").note


def test_gspo_is_aggregated_by_sequence() -> None:
    conversion = actor("policy_loss.loss_mode", "gspo")
    assert conversion.values["actor.loss_agg_mode"] == "seq-mean-token-mean"
    assert any("GSPO" in item.note for item in conversion.findings if item.became == "differs")


def test_a_loss_that_is_not_offered_is_refused_by_name() -> None:
    conversion = actor("policy_loss.loss_mode", "geo_mean")
    assert conversion.values["actor.policy_loss"] == "geo_mean"
    assert any("must be one of vanilla, gspo" in text for text in conversion.to_set)


def test_a_value_that_cannot_be_read_is_kept_and_refused() -> None:
    conversion = made(data__max_prompt_length="long")
    assert conversion.values["data.max_prompt_length"] == "long"
    assert any("data.max_prompt_length" in text for text in conversion.to_set)


@pytest.mark.parametrize("value", ["x", [1], -3])
def test_a_value_of_the_wrong_kind_is_no_traceback(value: Any) -> None:
    for name in [rule.names[0] for rule in RULES if rule.to and rule.names]:
        verl = Verl({name: value})
        try:
            VERL.check_kinds(verl.values)
        except ValueError as error:
            assert name in str(error)
            continue
        for rule in RULES:
            list(apply.apply(rule, verl, VERL))


def test_old_names_of_keys() -> None:
    conversion = actor("use_token_level_loss", False, **{A + "ppo_micro_batch_size": 16})
    assert conversion.values["actor.loss_agg_mode"] == "seq-mean-token-mean"
    # Over all of the eight GPUs that verl takes for granted.
    assert conversion.values["actor.ppo_micro_batch_size_per_gpu"] == 2


def test_the_old_cap_of_importance_weights() -> None:
    values = actor("tis_imp_ratio_cap", 3.0).values
    prefix = "algorithm.rollout_correction."
    assert (values[prefix + "rollout_is"], values[prefix + "rollout_is_threshold"]) == ("token", 3)
    assert prefix + "rollout_is" not in actor("tis_imp_ratio_cap", -1).values


def test_the_layout_of_megatron() -> None:
    megatron = A + "megatron."
    sizes = {"tensor": 2, "pipeline": 2, "expert": 2}
    given = {f"{megatron}{name}_model_parallel_size": size for name, size in sizes.items()}
    given |= {
        "actor_rollout_ref.ref.megatron.tensor_model_parallel_size": 4,
        megatron + "override_transformer_config.recompute_granularity": "full",
    }
    conversion = convert(Verl(NEEDED | given))
    layout = {name: conversion.values[f"actor.layout.{name}"] for name in ("tp", "pp", "ep", "dp")}
    assert layout == {"tp": 2, "pp": 2, "ep": 2, "dp": 2}
    assert conversion.values["actor.layout.recompute"] == "full"
    assert conversion.values["actor.layout.sequence_parallel"] is True
    found = of(conversion, "actor_rollout_ref.ref.megatron.tensor_model_parallel_size")
    assert found.became == "no counterpart"


def test_a_critic_with_sizes_of_its_own_has_a_layout_of_its_own() -> None:
    given = {A + "megatron.tensor_model_parallel_size": 4}
    same = {"critic.megatron.tensor_model_parallel_size": 4}
    shared = convert(Verl(NEEDED | given | same))
    assert not any(name.startswith("critic.layout") for name in shared.values)
    other = {
        "critic.megatron.tensor_model_parallel_size": 2,
        "critic.megatron.pipeline_model_parallel_size": 2,
    }
    own = convert(Verl(NEEDED | given | other))
    layout = {name: own.values[f"critic.layout.{name}"] for name in ("tp", "pp", "dp")}
    assert layout == {"tp": 2, "pp": 2, "dp": 2} and own.to_set == []
    assert own.values["critic.layout.sequence_parallel"] is True
    # Without a critic its keys say nothing.
    grpo = {"algorithm.adv_estimator": "grpo", A + "use_kl_loss": True}
    without = convert(Verl(NEEDED | given | other | grpo))
    assert not any(name.startswith("critic.layout") for name in without.values)


def test_the_layout_of_a_reward_model() -> None:
    prefix = "reward.reward_model."
    given = {
        prefix + "model_path": "/models/r",
        prefix + "rollout.tensor_model_parallel_size": 2,
        prefix + "enable_resource_pool": True,
        prefix + "nnodes": 1,
        prefix + "n_gpus_per_node": 4,
    }
    off = convert(Verl(NEEDED | given))
    assert not any(name.startswith("reward_model.") for name in off.values)
    values = convert(Verl(NEEDED | given | {prefix + "enable": True})).values
    assert (values["reward_model.layout.tp"], values["reward_model.layout.dp"]) == (2, 2)
    assert values["reward_model.placement"] == "disaggregated"


def test_what_is_off_is_not_asked_for() -> None:
    prefix = "algorithm.filter_groups."
    given = {
        "actor_rollout_ref.model.lora.alpha": 32,
        "actor_rollout_ref.model.target_modules": "all-linear",
        "algorithm.pf_ppo.weight_pow": 2.0,
        "distillation.n_gpus_per_node": 8,
        prefix + "metric": "reward",
    }
    assert convert(Verl(NEEDED | given)).to_set == []
    on = {"actor_rollout_ref.model.lora.rank": 8, "distillation.enabled": True}
    asked = convert(Verl(NEEDED | given | on | {prefix + "enable": True, R + "n": 2}))
    assert len([text for text in asked.to_set if "lora" in text or "distill" in text]) == 4
    assert asked.values[prefix + "metric"] == "seq_reward"


def test_a_share_of_warmup_needs_the_number_of_steps() -> None:
    ratio = {A + "optim.lr_warmup_steps_ratio": 0.1}
    asked = convert(Verl(NEEDED | ratio))
    assert of(asked, A + "optim.lr_warmup_steps_ratio").became == "to set"
    known = convert(Verl(NEEDED | ratio | {"trainer.total_training_steps": 200}))
    assert known.values["actor.optim.lr_warmup_steps"] == 20


def test_a_script_is_read_as_a_shell_would(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text(SCRIPT)
    verl = read_verl(file, ["trainer.nnodes=4"], {"HOME": "~"})
    assert verl.values == {
        "--config-name": "ppo_megatron_trainer",
        "data.train_files": ["~/a.parquet", "~/b.parquet"],
        "data.max_response_length": 2048,
        "data.return_raw_chat": True,
        "actor_rollout_ref.model.path": "org/m-7B",
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.rollout.name": "vllm",
        "trainer.val_before_train": False,
        "trainer.nnodes": 4,
    }
    assert verl.is_megatron
    assert verl.unknown == {"data.train_batch_size": "$batch_size"}
    assert verl.notes == ["raw is set in an if or a loop, which are not evaluated: 'True'"]
    assert read_verl(file, [], {"HOME": "~", "N": "3"}).values[R + "n"] == 3


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("$(((a + b) * 2))", "14"),
        ("$((b / 2 - 1))", "1"),
        ("${none:-${a}x}", "3x"),
        ('\'["x","y"]\'', '["x","y"]'),
        ("\\'$a,$b\\'", "'3,4'"),
        ("$(pwd)/c", "./c"),
        ("x${a:+_$a}${none:+_$none}", "x_3"),
    ],
)
def test_words_of_a_shell(word: str, value: str) -> None:
    script = read_script(
        f"a=3\nexport b=4\npython -m verl.trainer.main_ppo k.v={word}\n", {}, calls_verl
    )
    assert script is not None
    assert script.arguments == [f"k.v={value}"]


def test_an_array_that_a_condition_adds_to_is_named() -> None:
    text = """
ALWAYS=(a.b=1)
LAUNCH=(python)
if [ $fast ]; then
    ALWAYS+=(c.d=2)
    LAUNCH=(uv run python)
fi
"${LAUNCH[@]}" -m verl.trainer.main_ppo "${ALWAYS[@]}" 2>&1 | tee log.txt
"""
    script = read_script(text, {}, calls_verl)
    assert script is not None
    assert script.arguments == ["a.b=1"]
    # How it is launched is no setting.
    assert script.conditional == {"ALWAYS": "a.b=1"}


def test_commands_are_not_executed() -> None:
    text = "name=$(touch evil)\npython -m verl.trainer.main_ppo a.b=$name c.d=$(touch evil)\n"
    script = read_script(text, {}, calls_verl)
    assert script is not None
    assert script.arguments == []
    assert script.unknown == {"a.b": "$(touchevil)", "c.d": "$(touchevil)"}


def test_a_yaml_with_interpolations(tmp_path: Path) -> None:
    file = tmp_path / "verl.yaml"
    given = {
        "data": {"max_prompt_length": 99, "train_batch_size": "${env.NOT_KNOWN}"},
        "trainer": {"project_name": "p", "default_local_dir": "out/${trainer.project_name}"},
        "critic": {"ppo_epochs": "${oc.select:actor_rollout_ref.actor.ppo_epochs,3}"},
        "reward_model": {"max_length": "${data.max_prompt_length}", "num_workers": "???"},
    }
    file.write_text(yaml.safe_dump(given))
    verl = read_verl(file, [], {})
    assert verl.values["trainer.default_local_dir"] == "out/p"
    assert verl.values["critic.ppo_epochs"] == 3
    assert verl.values["reward_model.max_length"] == 99
    assert verl.values["reward_model.num_workers"] is None
    assert verl.unknown == {"data.train_batch_size": "${env.NOT_KNOWN}"}


def test_the_command_writes_a_file_and_says_what_is_left(tmp_path: Path) -> None:
    script, output = tmp_path / "run.sh", tmp_path / "ours.yaml"
    script.write_text(SCRIPT)
    arguments = ["config", "from-verl", str(script), "--output", str(output)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "to set: data.train_batch_size = $batch_size" in done.stdout
    assert "# to set: data.train_batch_size" in output.read_text()
    done = CliRunner().invoke(cli.app, [*arguments, "data.train_batch_size=512", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["to_set"] == []
    assert load_config(output).data.train_batch_size == 512


def test_a_file_that_calls_nothing_of_verl_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text("echo hello\n")
    with pytest.raises(ValueError, match="no line calls verl"):
        read_verl(file, [], {})


@pytest.mark.parametrize(
    ("logger", "ours"),
    [(["console", "wandb"], ["wandb"]), ("mlflow", ["mlflow"]), (["console", "comet"], [])],
)
def test_loggers_that_are_offered_go_on(logger: Any, ours: list[str], tmp_path: Path) -> None:
    file = tmp_path / "verl.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    made = convert(read_verl(file, [], {}))
    assert made.values["trainer.logger"] == ours
