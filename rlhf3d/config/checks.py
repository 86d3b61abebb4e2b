"""What ties the fields of a `Config` together: ranges, choices, divisibility.

Invariant: each problem is a sentence with key, value, arithmetic and fix. Nothing is read from disk
and nothing of the user's is executed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf3d.algorithms.correction_settings import correction_settings
from rlhf3d.algorithms.names import EstimatorNeeds
from rlhf3d.config.derived import (
    WIDTH_MULTIPLE,
    Batching,
    actor_batching,
    critic_batching,
    micro_batching,
)
from rlhf3d.config.fields import OneOf, broken_rule
from rlhf3d.config.groups import WorkerGroup, device_terms, group_of, worker_groups
from rlhf3d.config.keys import all_keys, value_of
from rlhf3d.config.schema import Config


def check(config: Config) -> list[str]:
    """Everything that is wrong between the fields, one sentence each with the arithmetic and the
    fix.

    An estimator of a user's file that is not executed yet is taken as one without a critic.
    """
    out_of_range = _check_ranges(config)
    if not config.algorithm.is_resolved:
        algorithm = replace(config.algorithm, own_needs=EstimatorNeeds())
        config = replace(config, algorithm=algorithm)
    problems = [*out_of_range.values(), *_check_required(config), *_check_optim(config)]
    problems += _check_sampling(config) + _check_algorithm(config)
    problems += _check_schedule(config) + _check_reward(config)
    if any(isinstance(value_of(config, name), int) for name in out_of_range):
        return problems  # the arithmetic below divides by such numbers
    for group in worker_groups(config):
        problems += _check_layout(group)
    problems += _check_devices(config)
    actor = group_of(config, "actor")
    problems += _check_batching(config, "actor", actor_batching(config), actor)
    if config.needs_critic:
        critic = group_of(config, "critic")
        if critic != actor or critic_batching(config) != actor_batching(config):
            problems += _check_batching(config, "critic", critic_batching(config), critic)
    return problems


def not_one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """The problem of a key whose value is not one of the names it may have."""
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name} = {value!r}: must be one of {', '.join(allowed)}{hint}"


def _check_ranges(config: Config) -> dict[str, str]:
    """Key -> the range or the choice that its value is not in."""
    problems = {}
    for key in all_keys():
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


def _check_optim(config: Config) -> list[str]:
    problems = []
    for role, optim in (("actor", config.actor.optim), ("critic", config.critic.optim)):
        if optim.min_lr > optim.lr:
            problems.append(
                f"{role}.optim.min_lr = {optim.min_lr}: above {role}.optim.lr = {optim.lr}"
            )
    return problems


def _check_required(config: Config) -> list[str]:
    problems = []
    if not config.model.path:
        problems.append(
            "model.path is not set: give a folder with config.json, safetensors and tokenizer"
        )
    if not config.trainer.output_dir:
        problems.append("trainer.output_dir is empty: give a folder for what the run writes")
    if not config.data.train_files:
        problems.append("data.train_files is empty: give at least one parquet file of prompts")
    return problems


def _check_batching(config: Config, role: str, batching: Batching, group: WorkerGroup) -> list[str]:
    batch, mini, mini_key = (
        config.data.train_batch_size,
        batching.mini_batch_size,
        f"{role}.ppo_mini_batch_size",
    )
    problems = []
    if batch % mini:
        problems.append(
            f"data.train_batch_size = {batch} prompts do not divide by {mini_key} = {mini}: "
            f"{batch} % {mini} = {batch % mini}"
        )
    if batching.max_tokens is not None:
        return problems + _check_budget(config, role, batching, group)
    return problems + _check_fixed(config, role, batching, group)


def _check_fixed(config: Config, role: str, batching: Batching, group: WorkerGroup) -> list[str]:
    """Micro-batches of so many sequences: they must come out even on every rank."""
    n, mini, micro = config.rollout.n, batching.mini_batch_size, batching.micro_batch_size
    layout, layout_key = group.layout_config, group.key
    mini_key, micro_key = f"{role}.ppo_mini_batch_size", f"{role}.ppo_micro_batch_size_per_gpu"
    if mini * n % layout.dp:
        return [
            f"{mini_key} = {mini} prompts x rollout.n = {n} = {mini * n} sequences do not divide over "
            f"{layout_key}.dp = {layout.dp} ranks: {mini * n} % {layout.dp} = {mini * n % layout.dp}"
        ]
    per_rank = mini * n // layout.dp
    if per_rank % micro:
        return [
            f"{mini_key} = {mini} x rollout.n = {n} / {layout_key}.dp = {layout.dp} = {per_rank} sequences "
            f"a rank do not divide by {micro_key} = {micro}: {per_rank} % {micro} = {per_rank % micro}"
        ]
    if (layout.vpp or 1) > 1 and per_rank // micro % layout.pp:
        return [
            f"{micro_key} = {micro} makes {per_rank // micro} micro-batches a rank; interleaving "
            f"({layout_key}.vpp = {layout.vpp}) needs a multiple of {layout_key}.pp = {layout.pp}"
        ]
    return []


def _check_budget(config: Config, role: str, batching: Batching, group: WorkerGroup) -> list[str]:
    """Micro-batches of so many tokens: each must hold the longest sequence there can be."""
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    rule = micro_batching(config, batching, group.layout_config)
    longest = rule.width(prompt + response)
    if rule.tokens is None or longest <= rule.tokens:
        return []
    layout, kernels = group.layout_config, WIDTH_MULTIPLE.get(config.cluster.platform, 1)
    shared = ["2", f"{group.key}.cp"] * (layout.cp > 1)
    shared += [f"{group.key}.tp"] * (layout.sequence_parallel and layout.tp > 1)
    sizes = " and ".join([" x ".join(shared)] * bool(shared) + [str(kernels)] * (kernels > 1))
    total = f" = {rule.multiple_of}" if shared else ""
    rounded = f", rounded up to a multiple of {sizes}{total}" if rule.multiple_of > 1 else ""
    return [
        f"{role}.ppo_max_token_len_per_gpu = {rule.tokens}: below the longest sequence, data.max_prompt_length {prompt}"
        f" + data.max_response_length {response}{rounded} = {longest} tokens; set {longest} or more"
    ]


def _check_layout(group: WorkerGroup) -> list[str]:
    layout, key = group.layout_config, group.key
    problems = []
    if (layout.vpp or 1) > 1 and layout.pp == 1:
        problems.append(f"{key}.vpp = {layout.vpp}: needs {key}.pp above 1; set vpp=null")
    if layout.sequence_parallel and layout.tp == 1:
        problems.append(f"{key}.sequence_parallel = true: needs {key}.tp above 1")
    if layout.overlap_param_gather:
        for name in (
            "distributed_optimizer",
            "overlap_grad_reduce",
        ):  # which gathers, and which cuts into buckets
            if not getattr(layout, name):
                problems.append(f"{key}.overlap_param_gather = true: needs {key}.{name} = true")
    return problems


def _check_devices(config: Config) -> list[str]:
    """On GPUs: what has devices of its own, one after the other, engines beside the actor, and
    kernels' wishes.
    """
    cluster, rollout = config.cluster, config.rollout
    if cluster.platform != "cuda":
        return []
    gpus, terms = cluster.num_nodes * cluster.gpus_per_node, device_terms(config)
    needed, ranks = sum(count for _, count in terms), rollout.engines * rollout.tensor_parallel_size
    problems = [
        f"{group.key}.cp = {group.layout.cp} with model.dtype = float32: Transformer Engine's context-parallel "
        "attention is for bfloat16; set model.dtype=bfloat16, or cp=1"
        for group in worker_groups(config)
        if group.layout.cp > 1 and config.model.dtype == "float32"
    ]
    if needed > gpus:
        total = "" if len(terms) == 1 else f" = {needed} GPUs"
        problems.append(
            f"{' + '.join(text for text, _ in terms)}{total}, more than "
            f"cluster.num_nodes {cluster.num_nodes} x gpus_per_node {cluster.gpus_per_node} = {gpus} GPUs"
        )
    if rollout.placement == "colocated" and ranks > gpus:
        problems.append(
            f"rollout.engines {rollout.engines} x rollout.tensor_parallel_size "
            f"{rollout.tensor_parallel_size} = {ranks} GPUs, more than {gpus}"
        )
    return problems


def _check_sampling(config: Config) -> list[str]:
    rollout, algorithm = config.rollout, config.algorithm
    correction = config.algorithm.rollout_correction
    corrected = (
        correction.rollout_is is not None
        or correction.rollout_rs is not None
        or correction.bypass_mode
    )
    problems = []
    if rollout.top_p != 1.0 and not corrected:
        problems.append(
            f"rollout.top_p = {rollout.top_p}: training needs the full vocabulary; set 1.0 (off)"
        )
    if rollout.top_k != -1 and not corrected:
        problems.append(
            f"rollout.top_k = {rollout.top_k}: training needs the full vocabulary; set -1 (off)"
        )
    problems += _check_quantization(config, corrected)
    for text in rollout.stop:
        if re.fullmatch(r"(\\[nrt])+", text):
            problems.append(
                f'rollout.stop = {text}: a backslash and a letter are no line end; write rollout.stop=["{text}"]'
            )
    if "" in rollout.stop:
        problems.append(
            "rollout.stop holds an empty text, which would end every completion; remove it"
        )
    if algorithm.needs.groups and rollout.n == 1:
        problems.append(
            f"rollout.n = 1: algorithm.adv_estimator = {algorithm.adv_estimator} compares completions; "
            "set 2 or more"
        )
    if config.data.val_max_samples == 0:
        problems.append(
            f"data.val_max_samples = {config.data.val_max_samples}: must be 1 or more, or -1 (all)"
        )
    return problems


def _check_quantization(config: Config, corrected: bool) -> list[str]:
    rollout = config.rollout
    name = f"rollout.quantization = {rollout.quantization}"
    if rollout.quantization == "none":
        return []
    problems = []
    if not corrected:
        problems.append(
            f"{name}: what samples is not what trains; set algorithm.rollout_correction.rollout_is=token (or "
            "rollout_rs, or bypass_mode)"
        )
    if rollout.dtype == "float32":
        problems.append(f"{name}: quantises bfloat16; set rollout.dtype=bfloat16, not float32")
    if rollout.tensor_parallel_size != 1:
        problems.append(
            f"{name}: a weight's scales are those of all its columns, so it must be on one rank; set "
            f"rollout.tensor_parallel_size=1, not {rollout.tensor_parallel_size}, and more rollout.engines"
        )
    return problems


def _check_algorithm(config: Config) -> list[str]:
    algorithm, data, buffer = config.algorithm, config.data, config.reward.overlong_buffer
    groups, correction = algorithm.filter_groups, algorithm.rollout_correction
    problems = []
    if groups.enable and config.rollout.n == 1:
        problems.append(
            "rollout.n = 1: algorithm.filter_groups compares a prompt's completions; set 2 or more"
        )
    if groups.enable and groups.metric == "seq_final_reward" and algorithm.use_kl_in_reward:
        problems.append(
            "algorithm.filter_groups.metric = seq_final_reward with algorithm.use_kl_in_reward: groups are chosen "
            "before the log-probs that the KL needs are computed; set metric=seq_reward, or use actor.use_kl_loss"
        )
    if (
        data.gen_batch_size is not None
        and not groups.enable
        and data.gen_batch_size != data.train_batch_size
    ):
        problems.append(
            f"data.gen_batch_size = {data.gen_batch_size}: without algorithm.filter_groups a step generates its "
            f"data.train_batch_size = {data.train_batch_size} prompts; set null"
        )
    if buffer.enable and buffer.len > data.max_response_length:
        problems.append(
            f"reward.overlong_buffer.len = {buffer.len}: longer than data.max_response_length = "
            f"{data.max_response_length}"
        )
    sequences, horizon = data.train_batch_size * config.rollout.n, algorithm.kl_ctrl.horizon
    if (
        algorithm.use_kl_in_reward
        and algorithm.kl_ctrl.type == "adaptive"
        and sequences >= 5 * horizon
    ):
        problems.append(
            f"algorithm.kl_ctrl.horizon = {horizon}: too short for steps of data.train_batch_size x rollout.n = "
            f"{sequences} sequences; set it above {sequences // 5}"
        )
    weights = correction.rollout_is is not None or correction.rollout_rs is not None
    if correction.bypass_mode and weights:
        problems.append(
            "algorithm.rollout_correction.bypass_mode = true: the loss's own ratio is the correction, so rollout_is "
            "and rollout_rs must be null; for truncated weights without PPO's clip set actor.policy_loss=cispo"
        )
    if weights:
        try:
            correction_settings(
                correction.rollout_is,
                correction.rollout_is_threshold,
                correction.rollout_is_batch_normalize,
                correction.rollout_rs,
                correction.rollout_rs_threshold,
            )
        except ValueError as error:
            problems.append(str(error))
    return problems


def _check_retention(config: Config) -> list[str]:
    trainer = config.trainer
    if trainer.keep_best and trainer.keep_last is None:
        return [
            f"trainer.keep_best = {trainer.keep_best}: every checkpoint is kept; set trainer.keep_last too"
        ]
    if trainer.keep_best and (not trainer.test_freq or trainer.save_freq % trainer.test_freq):
        return [
            f"trainer.save_freq = {trainer.save_freq}: with trainer.keep_best it must be a multiple of "
            f"trainer.test_freq = {trainer.test_freq}, so that each checkpoint has a validation of its step"
        ]
    if trainer.keep_best and not config.data.val_files:
        return [
            f"trainer.keep_best = {trainer.keep_best}: data.val_files is empty, so no checkpoint is better; name some"
        ]
    return []


def _check_schedule(config: Config) -> list[str]:
    total, warmup = config.trainer.total_training_steps, config.trainer.critic_warmup
    problems = _check_retention(config)
    for role in ("actor", "critic") if config.needs_critic else ("actor",):
        steps = value_of(config, f"{role}.optim.lr_warmup_steps")
        if total is not None and steps > total:
            problems.append(
                f"{role}.optim.lr_warmup_steps = {steps}: longer than trainer.total_training_steps = {total}"
            )
    if warmup and not config.needs_critic:
        problems.append(
            f"trainer.critic_warmup = {warmup}: algorithm.adv_estimator = {config.algorithm.adv_estimator} "
            "has no critic; set 0"
        )
    if total is not None and warmup >= total:
        problems.append(
            f"trainer.critic_warmup = {warmup}: leaves no step of {total} to train the actor"
        )
    return problems


def _check_reward(config: Config) -> list[str]:
    """The reward model and its weight go together, and something scores."""
    weights, path = config.reward.weights, config.reward_model.path
    problems = []
    if not weights:
        problems.append(
            "reward.weights = {}: nothing is rewarded; set {accuracy: 1.0} or {reward_model: 1.0}"
        )
    if "reward_model" in weights and path is None:
        problems.append(
            "reward.weights has reward_model, but reward_model.path is not set: name its folder"
        )
    if "reward_model" not in weights and path is not None:
        problems.append(
            f"reward_model.path = {path}: reward.weights gives it no weight; set reward.weights={{reward_model: 1.0}}, "
            "or with a rule {accuracy: 1.0, reward_model: 0.5}"
        )
    if set(weights) == {"reward_model"} and config.custom_reward_function.path is not None:
        problems.append(
            f"custom_reward_function.path = {config.custom_reward_function.path}: reward.weights gives accuracy, which "
            "is what it scores, no weight; add accuracy to reward.weights, or set path=null"
        )
    return problems
