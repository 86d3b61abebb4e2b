"""GRPO recipes of NeMo-RL as configurations of ours: inheritance, backends, sizes, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.config.convert.apply import Conversion, apply, convert
from rlhf3d.config.convert.nemo_rl.read import Nemo, read_nemo_rl
from rlhf3d.config.convert.nemo_rl.table import NEMO_RL
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import load_config

CORRECTION = "algorithm.rollout_correction."
MEGATRON = "policy.megatron_cfg."
BASE = """
grpo: {num_prompts_per_step: 32, num_generations_per_prompt: 8, num_generations: 8, seed: 7}
policy:
  model_name: org/m-1B
  max_total_sequence_length: 1024
  train_global_batch_size: ${mul:${grpo.num_prompts_per_step}, ${div:${grpo.num_generations}, 2}}
  train_micro_batch_size: 2
  max_grad_norm: 1.0
  dtensor_cfg: {enabled: true, tensor_parallel_size: 2, activation_checkpointing: true}
  megatron_cfg:
    enabled: false
    tensor_model_parallel_size: 4
    pipeline_model_parallel_size: 2
    sequence_parallel: true
    optimizer: {lr: 3.0e-6, min_lr: 3.0e-7, clip_grad: "${policy.max_grad_norm}"}
    scheduler: {lr_decay_style: cosine, lr_warmup_iters: 5}
  optimizer: {name: torch.optim.AdamW, kwargs: {lr: 1.0e-6}}
  scheduler:
    - {name: torch.optim.lr_scheduler.LinearLR, kwargs: {start_factor: 0.1, total_iters: 20}}
    - {name: torch.optim.lr_scheduler.CosineAnnealingLR, kwargs: {eta_min: 1.0e-7}}
    - {milestones: [20]}
  generation:
    max_new_tokens: ${policy.max_total_sequence_length}
    vllm_cfg: {tensor_parallel_size: 2, precision: "${policy.precision}"}
  precision: bfloat16
data: {max_input_seq_length: 256}
cluster: {gpus_per_node: 8, num_nodes: 2}
"""
RECIPE = """
defaults: ../base.yaml
policy:
  dtensor_cfg: {enabled: false}
  megatron_cfg: {enabled: true}
  optimizer: null
"""


def made(**given: Any) -> Conversion:
    """A conversion of keys, __ for a dot, with a model and data."""
    needed = {"policy.model_name": "/models/m", "grpo.num_generations_per_prompt": 8}
    return convert(
        Nemo(needed | {name.replace("__", "."): value for name, value in given.items()}), NEMO_RL
    )


def recipe(folder: Path, text: str = RECIPE) -> Path:
    """A recipe in a folder of its own, below the file that it derives from."""
    (folder / "base.yaml").write_text(BASE)
    (folder / "recipes").mkdir()
    file = folder / "recipes" / "mine.yaml"
    file.write_text(text)
    return file


def test_every_key_of_ours_in_the_table_exists_and_none_of_theirs_is_in_two_rules() -> None:
    known = {key.name for key in all_keys()}
    assert [rule.to for rule in NEMO_RL.rules if rule.to not in {"", *known}] == []
    names: list[str] = []
    for rule in NEMO_RL.rules:
        names += rule.names
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_a_recipe_lies_over_what_it_derives_from(tmp_path: Path) -> None:
    nemo = read_nemo_rl(recipe(tmp_path), ["++grpo.seed=8"])
    assert nemo.values["policy.train_global_batch_size"] == 128
    assert nemo.values["policy.generation.max_new_tokens"] == 1024
    assert nemo.values["grpo.seed"] == 8
    # null takes the place of a section.
    assert "policy.optimizer.kwargs.lr" not in nemo.values
    assert nemo.is_megatron


def test_megatron(tmp_path: Path) -> None:
    values = convert(read_nemo_rl(recipe(tmp_path), []), NEMO_RL).values
    layout = {name: values.get(f"actor.layout.{name}") for name in ("tp", "pp", "dp")}
    assert layout == {"tp": 4, "pp": 2, "dp": 2}
    assert values["actor.layout.sequence_parallel"] is True
    assert "actor.layout.recompute" not in values
    assert (values["actor.optim.lr"], values["actor.optim.min_lr"]) == (3e-6, 3e-7)
    assert values["actor.optim.lr_decay_style"] == "cosine"
    assert values["actor.optim.lr_warmup_steps"] == 5


def test_the_other_backend(tmp_path: Path) -> None:
    recipe(tmp_path)
    values = convert(read_nemo_rl(tmp_path / "base.yaml", []), NEMO_RL).values
    layout = {name: values.get(f"actor.layout.{name}") for name in ("tp", "pp", "dp")}
    assert layout == {"tp": 2, "pp": None, "dp": 8}
    assert values["actor.layout.recompute"] == "full"
    # Our default of the rate is the recipe's.
    assert "actor.optim.lr" not in values and values["actor.optim.min_lr"] == 1e-7
    assert values["actor.optim.lr_decay_style"] == "cosine"
    assert values["actor.optim.lr_warmup_steps"] == 20


def test_sizes(tmp_path: Path) -> None:
    conversion = convert(read_nemo_rl(recipe(tmp_path), []), NEMO_RL)
    values = conversion.values
    assert (values["data.train_batch_size"], values["actor.ppo_mini_batch_size"]) == (32, 16)
    # What the prompt leaves of 1024.
    assert (values["data.max_prompt_length"], values["data.max_response_length"]) == (256, 768)
    assert values["rollout.engines"] == 8
    assert values["model.path"] == "models/m-1B"
    assert conversion.to_set == [
        "data.train_files is empty: give at least one parquet file of prompts"
    ]


@pytest.mark.parametrize(("given", "ours"), [(1_000_000, None), (300, 300)])
def test_a_million_steps_are_no_limit(given: int, ours: int | None) -> None:
    assert made(grpo__max_num_steps=given).values.get("trainer.total_training_steps") == ours


def test_one_length_for_both_is_named() -> None:
    given = {
        "policy.max_total_sequence_length": 512,
        "data.max_input_seq_length": 512,
        "policy.generation.max_new_tokens": 512,
    }
    found = [item for item in made(**given).findings if item.to == "data.max_response_length"]
    assert found[0].became == "differs" and "together by 512" in found[0].note


def test_a_token_budget_holds_the_longest_sequence() -> None:
    values = made(
        policy__max_total_sequence_length=2048,
        data__max_input_seq_length=2048,
        policy__generation__max_new_tokens=2048,
        policy__sequence_packing__enabled=True,
        policy__sequence_packing__train_mb_tokens=2048,
    ).values
    assert values["actor.ppo_max_token_len_per_gpu"] == 4096
    assert values["actor.use_dynamic_bsz"] is values["model.use_remove_padding"] is True


@pytest.mark.parametrize(
    ("normalize", "leave_one_out", "ours"),
    [
        (True, False, ("grpo", None)),
        (False, False, ("grpo", False)),
        (False, True, ("rloo", None)),
        (True, True, ("grpo", None)),
    ],
)
def test_estimators(normalize: bool, leave_one_out: bool, ours: tuple[str, bool | None]) -> None:
    conversion = made(
        grpo__normalize_rewards=normalize, grpo__use_leave_one_out_baseline=leave_one_out
    )
    values = conversion.values
    found = values["algorithm.adv_estimator"], values.get("algorithm.norm_adv_by_std_in_grpo")
    assert found == ours
    told = any("completion itself" in item.note for item in conversion.findings)
    assert told == (normalize and leave_one_out)


@pytest.mark.parametrize(
    ("switch", "ours"),
    [
        ("sequence_level_importance_ratios", "gspo"),
        ("use_cispo", "cispo"),
        ("disable_ppo_ratio", "pg"),
    ],
)
def test_losses(switch: str, ours: str) -> None:
    given = {f"loss_fn.{switch}": True, "loss_fn.token_level_loss": False}
    values = made(**given).values
    assert values["actor.policy_loss"] == ours
    assert values["actor.loss_agg_mode"] == "seq-mean-token-mean"
    assert "actor.clip_ratio_c" not in values
    # NeMo-RL's penalty where none is given.
    assert (values["actor.use_kl_loss"], values["actor.kl_loss_coef"]) == (True, 0.01)


def test_kl_in_the_reward() -> None:
    given = {"reference_policy_kl_penalty": 0.2, "use_kl_in_reward": True}
    values = made(**{f"loss_fn.{name}": value for name, value in given.items()}).values
    assert "actor.use_kl_loss" not in values
    assert values["algorithm.use_kl_in_reward"] is True
    assert values["algorithm.kl_ctrl.kl_coef"] == 0.2


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (None, ("token", 1e9, None)),
        ("tis", ("token", 2.0, None)),
        ("icepop", ("token", "0.5_2", None)),
        ("seq-mask-tis", ("token", 1e9, "0.5_2")),
    ],
)
def test_importance_sampling(kind: str | None, ours: tuple[Any, ...]) -> None:
    given: dict[str, Any] = {"loss_fn.use_importance_sampling_correction": True}
    if kind is not None:
        prefix = "loss_fn.truncated_importance_sampling_"
        given |= {prefix + "type": kind, prefix + "ratio": 2.0}
        given |= {} if kind == "tis" else {prefix + "ratio_min": 0.5}
    values = made(**given).values
    names = ("rollout_is", "rollout_is_threshold", "rollout_rs_threshold")
    # Our own threshold is 2.
    default = {"rollout_is_threshold": 2.0}
    found = tuple(values.get(CORRECTION + name, default.get(name)) for name in names)
    assert found == ours


def test_engines_on_gpus_of_their_own() -> None:
    values = made(
        cluster__gpus_per_node=8,
        cluster__num_nodes=4,
        policy__generation__colocated__enabled=False,
        policy__generation__colocated__resources__num_nodes=1,
        policy__generation__vllm_cfg__tensor_parallel_size=2,
        grpo__async_grpo__enabled=True,
        grpo__async_grpo__max_trajectory_age_steps=2,
        loss_fn__use_importance_sampling_correction=True,
    ).values
    assert values["rollout.placement"] == "disaggregated"
    assert (values["rollout.engines"], values["actor.layout.dp"]) == (4, 24)
    assert values["rollout.max_staleness"] == 2


def test_what_is_off_is_not_asked_for() -> None:
    given = {
        "grpo.reward_scaling.enabled": False,
        "grpo.overlong_filtering": False,
        "policy.dtensor_cfg.lora_cfg.enabled": False,
        "policy.dtensor_cfg.lora_cfg.dim": 8,
        "grpo.reward_shaping.overlong_buffer_length": 99999,
        "grpo.batch_multiplier": 3,
    }
    conversion = made(**given)
    assert len(conversion.to_set) == 1 and "data.train_files" in conversion.to_set[0]
    asked = made(**given | {"grpo.overlong_filtering": True}).to_set
    assert any("grpo.overlong_filtering" in text for text in asked)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("defaults: none.yaml\n", "is not there"), ("defaults: mine.yaml\n", "derives from itself")],
)
def test_what_a_recipe_derives_from_is_missing(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_nemo_rl(recipe(tmp_path, text), [])


def test_an_interpolation_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("grpo: {seed: '${mul:${none.such}, 2}', val_period: '${odd:1}'}\n")
    nemo = read_nemo_rl(file, [])
    assert nemo.unknown == {"grpo.seed": "${mul:${none.such}, 2}", "grpo.val_period": "${odd:1}"}


@pytest.mark.parametrize("value", ["x", [1], -3, 0])
@pytest.mark.parametrize("megatron", [True, False])
def test_a_value_of_the_wrong_kind_is_no_traceback(value: Any, megatron: bool) -> None:
    on = {
        MEGATRON + "enabled": megatron,
        "policy.sequence_packing.enabled": True,
        "grpo.use_dynamic_sampling": True,
        "loss_fn.use_importance_sampling_correction": True,
    }
    for name in [rule.names[0] for rule in NEMO_RL.rules if rule.to and rule.names]:
        nemo = Nemo(on | {name: value})
        try:
            NEMO_RL.check_kinds(nemo.values)
        except ValueError as error:
            assert name in str(error)
            continue
        for rule in NEMO_RL.rules:
            list(apply(rule, nemo, NEMO_RL))


def test_the_command_writes_what_a_run_loads(tmp_path: Path) -> None:
    output = tmp_path / "ours.yaml"
    file = recipe(tmp_path)
    arguments = ["config", "from-nemo-rl", str(file), "cluster.num_nodes=1"]
    done = CliRunner().invoke(cli.app, [*arguments, "--output", str(output)])
    assert done.exit_code == 2 and "data.train_files is empty" in done.stdout
    assert yaml.safe_load(output.read_text())["actor"]["layout"]["tp"] == 4
    assert load_config(output, ["data.train_files=[a.parquet]"]).trainer.seed == 7
