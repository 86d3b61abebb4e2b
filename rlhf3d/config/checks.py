"""What ties the fields of a `Config` together: ranges, choices, divisibility.

Invariant: each problem is a sentence with key, value, arithmetic and fix. Nothing is read from disk
and nothing of the user's is executed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from rlhf3d.algorithms.correction_settings import correction_settings
from rlhf3d.algorithms.names import EstimatorNeeds
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.fields import OneOf, broken_rule, rules_text
from rlhf3d.config.keys import Key, all_keys, value_of
from rlhf3d.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    FilterGroupsConfig,
    ModelConfig,
    OptimConfig,
    OverlongBufferConfig,
    RolloutConfig,
    RolloutCorrectionConfig,
    TrainerConfig,
)
from rlhf3d.config.size_checks import check_sizes
from rlhf3d.config.staleness_checks import check_staleness


def check(config: Config) -> list[str]:
    """Every problem of the fields and between them, one sentence each.

    An estimator of a user's file that is not executed yet is taken as one without a critic.
    """
    out_of_range = _check_ranges(config)
    if not config.algorithm.is_resolved:
        # So that `needs` below has an answer; `load_run` checks again once the file was executed.
        algorithm = replace(config.algorithm, own_needs=EstimatorNeeds())
        config = replace(config, algorithm=algorithm)
    data, rollout, trainer = config.data, config.rollout, config.trainer
    algorithm, environment, actor = config.algorithm, config.environment, config.actor
    correction, custom = algorithm.rollout_correction, config.custom_reward_function.path
    weights, model = config.reward.weights, config.reward_model.path
    optims = {"actor": actor.optim, "critic": config.critic.optim}
    problems = [
        *out_of_range.values(),
        *_check_required(config.model, data, trainer),
        *_check_optim(optims),
        *_check_sampling(rollout, algorithm),
        *_check_data(data, algorithm.filter_groups),
        *_check_overlong(config.reward.overlong_buffer, data.max_response_length),
        *_check_filter_groups(algorithm, rollout.n),
        *_check_kl(algorithm, data.train_batch_size * rollout.n),
        *_check_correction(correction),
        *check_staleness(rollout, correction, actor.policy_loss, environment),
        *_check_retention(trainer, data),
        *_check_schedule(trainer, algorithm, optims),
        *_check_reward(weights, model, custom, environment.enabled),
        *_check_environment(environment, data),
    ]
    # The arithmetic of sizes divides by them.
    if not any(isinstance(value_of(config, name), int) for name in out_of_range):
        problems += check_sizes(config)
    return problems


@cache
def _keys_with_rules() -> list[Key]:
    # A layout search checks thousands of configurations.
    return [key for key in all_keys() if rules_text(key.type)]


def not_one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """The problem of a key whose value is not one of the names it may have."""
    # Only a name that is close enough to be a typo: the default cutoff, 0.6.
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name} = {value!r}: must be one of {', '.join(allowed)}{hint}"


def _check_ranges(config: Config) -> dict[str, str]:
    """Key -> the range or the choice that its value is not in."""
    problems = {}
    for key in _keys_with_rules():
        value = value_of(config, key.name)
        rule = broken_rule(value, key.type)
        if isinstance(rule, OneOf):
            # The names of a user's file are known once it is executed: `resolve_algorithms`.
            if not (rule.extensible and config.algorithm.custom_path is not None):
                problems[key.name] = not_one_of(key.name, value, rule.names)
        elif rule is not None:
            shown = list(value) if isinstance(value, tuple) else value
            problems[key.name] = f"{key.name} = {shown}: must be {rule.text}"
    return problems


def _check_required(model: ModelConfig, data: DataConfig, trainer: TrainerConfig) -> Iterator[str]:
    if not model.path:
        yield "model.path is not set: give a folder with config.json, safetensors and tokenizer"
    if not trainer.output_dir:
        yield "trainer.output_dir is empty: give a folder for what the run writes"
    if not data.train_files:
        yield "data.train_files is empty: give at least one parquet file of prompts"


def _check_optim(optims: Mapping[str, OptimConfig]) -> Iterator[str]:
    for role, optim in optims.items():
        if optim.min_lr > optim.lr:
            yield f"{role}.optim.min_lr = {optim.min_lr}: above {role}.optim.lr = {optim.lr}"


_FULL_VOCABULARY = "training takes log-probs over the full vocabulary"
_OR_CORRECT = "or algorithm.rollout_correction.rollout_is=token"


def _check_sampling(rollout: RolloutConfig, algorithm: AlgorithmConfig) -> Iterator[str]:
    correction = algorithm.rollout_correction
    corrected = _has_weights(correction) or correction.bypass_mode
    if rollout.top_p != 1.0 and not corrected:
        yield f"rollout.top_p = {rollout.top_p}: {_FULL_VOCABULARY}; set 1.0 (off), {_OR_CORRECT}"
    if rollout.top_k != -1 and not corrected:
        yield f"rollout.top_k = {rollout.top_k}: {_FULL_VOCABULARY}; set -1 (off), {_OR_CORRECT}"
    if rollout.quantization != "none":
        yield from _check_quantization(rollout, corrected)
    # A shell passes \n in an override as two characters; quoted, YAML makes it a line end.
    for text in rollout.stop:
        if re.fullmatch(r"(\\[nrt])+", text):
            yield (
                f"rollout.stop = {text}: this is a backslash and a letter, not a line end; write "
                f'rollout.stop=["{text}"]'
            )
    if "" in rollout.stop:
        yield "rollout.stop holds an empty text, which would end every completion; remove it"
    if algorithm.needs.groups and rollout.n == 1:
        yield (
            f"rollout.n = 1: algorithm.adv_estimator = {algorithm.adv_estimator} compares "
            "completions; set 2 or more"
        )


def _has_weights(correction: RolloutCorrectionConfig) -> bool:
    return correction.rollout_is is not None or correction.rollout_rs is not None


def _check_quantization(rollout: RolloutConfig, corrected: bool) -> Iterator[str]:
    name = f"rollout.quantization = {rollout.quantization}"
    if not corrected:
        yield (
            f"{name}: the engines sample from another policy than the one that trains; set "
            "algorithm.rollout_correction.rollout_is=token (or rollout_rs, or bypass_mode)"
        )
    if rollout.dtype == "float32":
        yield f"{name}: quantizes bfloat16; set rollout.dtype=bfloat16, not float32"
    if rollout.tensor_parallel_size != 1:
        yield (
            f"{name}: a weight's scales are those of all its columns, so it must be on one rank; "
            f"set rollout.tensor_parallel_size=1, not {rollout.tensor_parallel_size}, and more "
            "rollout.engines"
        )


def _check_data(data: DataConfig, groups: FilterGroupsConfig) -> Iterator[str]:
    if data.val_max_samples == 0:
        yield "data.val_max_samples = 0: must be 1 or more, or -1 (all)"
    # Only dynamic sampling generates in batches of its own.
    if not groups.enable and data.gen_batch_size not in (None, data.train_batch_size):
        yield (
            f"data.gen_batch_size = {data.gen_batch_size}: without algorithm.filter_groups a step "
            f"generates its data.train_batch_size = {data.train_batch_size} prompts; set null"
        )


def _check_overlong(buffer: OverlongBufferConfig, longest: int) -> Iterator[str]:
    if buffer.enable and buffer.len > longest:
        yield (
            f"reward.overlong_buffer.len = {buffer.len}: longer than data.max_response_length = "
            f"{longest}"
        )


def _check_filter_groups(algorithm: AlgorithmConfig, n: int) -> Iterator[str]:
    groups = algorithm.filter_groups
    if not groups.enable:
        return
    if n == 1:
        yield (
            "rollout.n = 1: algorithm.filter_groups compares a prompt's completions; set 2 or more"
        )
    if groups.metric == "seq_final_reward" and algorithm.use_kl_in_reward:
        yield (
            "algorithm.filter_groups.metric = seq_final_reward with algorithm.use_kl_in_reward: "
            "groups are chosen before the log-probs that the KL needs are computed; set "
            "metric=seq_reward, or use actor.use_kl_loss"
        )


def _check_kl(algorithm: AlgorithmConfig, sequences: int) -> Iterator[str]:
    """`sequences`: those of a step."""
    controller = algorithm.kl_ctrl
    if not algorithm.use_kl_in_reward or controller.type != "adaptive":
        return
    # One update changes the coefficient by up to 0.2 * sequences / horizon of it.
    # From a factor of 5 on, one update could set the coefficient to 0 or below.
    if sequences >= 5 * controller.horizon:
        yield (
            f"algorithm.kl_ctrl.horizon = {controller.horizon}: too short for steps of "
            f"data.train_batch_size x rollout.n = {sequences} sequences; set it above "
            f"{sequences // 5}"
        )


def _check_correction(correction: RolloutCorrectionConfig) -> Iterator[str]:
    if not _has_weights(correction):
        return
    if correction.bypass_mode:
        yield (
            "algorithm.rollout_correction.bypass_mode = true: the loss's own ratio is the "
            "correction, so rollout_is and rollout_rs must be null; for truncated weights without "
            "PPO's clip set actor.policy_loss=cispo"
        )
    try:
        correction_settings(
            correction.rollout_is,
            correction.rollout_is_threshold,
            correction.rollout_is_batch_normalize,
            correction.rollout_rs,
            correction.rollout_rs_threshold,
        )
    except ValueError as error:
        yield str(error)


def _check_retention(trainer: TrainerConfig, data: DataConfig) -> Iterator[str]:
    best = f"trainer.keep_best = {trainer.keep_best}"
    if not trainer.keep_best:
        return
    if trainer.keep_last is None:
        yield f"{best}: every checkpoint is kept; set trainer.keep_last too"
    elif not trainer.test_freq or trainer.save_freq % trainer.test_freq:
        yield (
            f"trainer.save_freq = {trainer.save_freq}: with trainer.keep_best it must be a "
            f"multiple of trainer.test_freq = {trainer.test_freq}, so that each checkpoint has a "
            "validation of its step"
        )
    elif not data.val_files:
        yield f"{best}: data.val_files is empty, so no checkpoint is better; name some"


def _check_schedule(
    trainer: TrainerConfig, algorithm: AlgorithmConfig, optims: Mapping[str, OptimConfig]
) -> Iterator[str]:
    total, warmup = trainer.total_training_steps, trainer.critic_warmup
    has_critic = algorithm.needs.values
    # The critic's keys have defaults where there is no critic: nothing reads them.
    for role in ("actor", "critic") if has_critic else ("actor",):
        steps = optims[role].lr_warmup_steps
        if total is not None and steps > total:
            yield (
                f"{role}.optim.lr_warmup_steps = {steps}: longer than "
                f"trainer.total_training_steps = {total}"
            )
    if warmup and not has_critic:
        yield (
            f"trainer.critic_warmup = {warmup}: algorithm.adv_estimator = "
            f"{algorithm.adv_estimator} has no critic; set 0"
        )
    if total is not None and (late := [step for step in trainer.profile_steps if step > total]):
        yield (
            f"trainer.profile_steps = {list(trainer.profile_steps)}: step {late[0]} is after the "
            f"last, trainer.total_training_steps = {total}"
        )
    if total is not None and warmup >= total:
        yield f"trainer.critic_warmup = {warmup}: leaves no step of {total} to train the actor"


def _check_reward(
    weights: Mapping[str, float], model: str | None, custom: str | None, has_environment: bool
) -> Iterator[str]:
    """The reward model and its weight go together, and something scores."""
    if not weights:
        yield "reward.weights = {}: nothing is rewarded; set {accuracy: 1.0} or {reward_model: 1.0}"
    if "reward_model" in weights and model is None:
        yield "reward.weights has reward_model, but reward_model.path is not set: name its folder"
    if "reward_model" not in weights and model is not None:
        yield (
            f"reward_model.path = {model}: reward.weights gives it no weight; set "
            "reward.weights={reward_model: 1.0}, or with a rule {accuracy: 1.0, reward_model: 0.5}"
        )
    if "environment" in weights and not has_environment:
        yield (
            "reward.weights has environment, but environment.path is not set: name the file of the "
            "environment that gives rewards"
        )
    if custom is not None and set(weights) in ({"reward_model"}, {"environment"}):
        yield (
            f"custom_reward_function.path = {custom}: reward.weights gives accuracy, which is what "
            "it scores, no weight; add accuracy to reward.weights, or set path=null"
        )


def _check_environment(environment: EnvironmentConfig, data: DataConfig) -> Iterator[str]:
    if not environment.enabled:
        given = [name for name in ("name", "kwargs", "tools") if getattr(environment, name)]
        for name in given:
            yield (
                f"environment.{name} = {getattr(environment, name)}: environment.path is not set, "
                "so every trajectory is one completion; name the file, or take it out"
            )
        return
    if data.overlong_prompts == "truncate_right":
        yield (
            f"data.overlong_prompts = {data.overlong_prompts} with environment.path = "
            f"{environment.path}: cuts off the end of a prompt, where the chat template begins the "
            "model's turn; set truncate_left, filter or error"
        )
    for name in ("max_turn_tokens", "max_observation_tokens"):
        tokens = getattr(environment, name)
        if tokens is not None and tokens > data.max_response_length:
            yield (
                f"environment.{name} = {tokens}: more than data.max_response_length = "
                f"{data.max_response_length}, which is for all turns and observations together"
            )
    if environment.call_timeout_s > environment.trajectory_timeout_s:
        yield (
            f"environment.call_timeout_s = {environment.call_timeout_s}: longer than "
            f"environment.trajectory_timeout_s = {environment.trajectory_timeout_s}, which is for "
            "all calls together"
        )
    known = ("hermes", "llama3")
    if environment.tool_format not in known and ":" not in environment.tool_format:
        yield (
            f"{not_one_of('environment.tool_format', environment.tool_format, known)}; or name a "
            "parser of your own, FILE.py:FUNCTION"
        )
