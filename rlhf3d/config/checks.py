"""What ties the fields of a `Config` together: ranges, names, divisibility, files.

Invariant: each problem is a sentence with key, value, arithmetic and fix. Only `check_files` reads the disk, and
`algorithm.custom_path`, which decides what names there are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from rlhf3d.config.derived import (
    WIDTH_MULTIPLE,
    Batching,
    actor_batching,
    critic_batching,
    micro_batching,
)
from rlhf3d.config.groups import WorkerGroup, device_terms, group_of, worker_groups
from rlhf3d.config.schema import Config
from rlhf3d.models.engine_weights import check_engine_layout, check_quantization
from rlhf3d.models.spec import ModelSpec, check_layout, load_reward_spec, load_spec
from rlhf3d.paths import folder_problem

ADV_ESTIMATORS = (
    "gae",
    "grpo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "opo",
)
GROUP_ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus_baseline", "opo")
POLICY_LOSSES = ("vanilla", "gspo", "cispo", "pg")
_KL_ESTIMATORS = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl")
KL_TYPES = (*_KL_ESTIMATORS, *(f"{name}+" for name in _KL_ESTIMATORS))
LOSS_AGG_MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm",
)  # fmt: skip
DTYPES = ("auto", "bfloat16", "float32")
PLACEMENTS = ("colocated", "disaggregated")
ONE_OF: dict[str, tuple[str, ...]] = {
    "model.dtype": DTYPES,
    "rollout.dtype": DTYPES,
    "data.overlong_prompts": ("error", "filter", "truncate_left", "truncate_right"),
    "actor.optim.lr_decay_style": ("constant", "linear", "cosine"),
    "critic.optim.lr_decay_style": ("constant", "linear", "cosine"),
    "actor.policy_loss": POLICY_LOSSES,
    "actor.kl_loss_type": KL_TYPES,
    "actor.loss_agg_mode": LOSS_AGG_MODES,
    "critic.loss_agg_mode": LOSS_AGG_MODES,
    "algorithm.adv_estimator": ADV_ESTIMATORS,
    "algorithm.kl_penalty": KL_TYPES,
    "algorithm.kl_ctrl.type": ("fixed", "adaptive"),
    "algorithm.filter_groups.metric": ("acc", "score", "seq_reward", "seq_final_reward"),
    "trainer.on_nonfinite": ("stop", "skip"),
    "rollout.placement": PLACEMENTS,
    "critic.placement": PLACEMENTS,
    "trainer.save_hf": ("last", "always", "never"),
    "reward_model.placement": PLACEMENTS,
    "reward_model.overlong": ("error", "truncate_left"),
    "reward.method": ("flexible", "strict"),
    "cluster.platform": ("auto", "cpu", "cuda", "as_gpu"),
}
LAYOUT_SIZES = "tp cp pp dp vpp ep first_stage_layers last_stage_layers".split()
AT_LEAST_1 = [
    f"{role}.layout.{size}" for role in ("actor", "critic", "reward_model") for size in LAYOUT_SIZES
] + (
    "data.train_batch_size data.gen_batch_size data.max_prompt_length data.max_response_length "
    "actor.ppo_mini_batch_size "
    "actor.ppo_micro_batch_size_per_gpu actor.ppo_max_token_len_per_gpu actor.ppo_epochs critic.ppo_mini_batch_size "
    "critic.ppo_micro_batch_size_per_gpu critic.ppo_max_token_len_per_gpu critic.ppo_epochs rollout.n rollout.engines "
    "rollout.tensor_parallel_size rollout.sync_bucket_mib rollout.max_num_seqs rollout.threads "
    "algorithm.kl_ctrl.horizon algorithm.filter_groups.max_num_gen_batches reward.overlong_buffer.len "
    "reward.workers reward_model.micro_batch_size_per_gpu reward_model.max_length "
    "trainer.total_training_steps trainer.total_epochs trainer.keep_last cluster.num_nodes "
    "cluster.gpus_per_node cluster.threads_per_rank"
).split()
ABOVE_0 = (
    "actor.optim.lr actor.optim.eps critic.optim.lr critic.optim.eps actor.clip_ratio actor.clip_ratio_low "
    "actor.clip_ratio_high critic.cliprange_value rollout.temperature rollout.kv_cache_gib "
    "rollout.gpu_memory_utilization rollout.sync_timeout_s rollout.canary_max_abs_diff "
    "algorithm.kl_ctrl.target_kl reward.timeout_s reward_model.std trainer.grad_spike_factor validation.temperature "
    "trainer.max_wall_clock_s cluster.startup_timeout_s cluster.phase_timeout_s"
).split()
NOT_NEGATIVE = (
    "actor.optim.min_lr actor.optim.lr_warmup_steps actor.optim.weight_decay actor.optim.clip_grad "
    "critic.optim.min_lr critic.optim.lr_warmup_steps critic.optim.weight_decay critic.optim.clip_grad "
    "actor.entropy_coeff actor.kl_loss_coef rollout.canary_steps "
    "rollout.canary_every reward.overlong_buffer.penalty_factor "
    "algorithm.gamma algorithm.lam algorithm.kl_ctrl.kl_coef reward.max_error_rate "
    "validation.sampled_n trainer.seed trainer.test_freq trainer.save_freq trainer.keep_best trainer.critic_warmup"
).split()
AT_MOST_1 = (
    "rollout.gpu_memory_utilization algorithm.gamma algorithm.lam reward.max_error_rate actor.clip_ratio_low"
).split()


def check(config: Config) -> list[str]:
    """Everything that is wrong between the fields, one sentence each with the arithmetic and the fix."""
    try:
        names = _names(config)
    except ValueError as error:
        return [str(error)]
    problems = _check_values(config, names) + _check_sampling(config) + _check_algorithm(config)
    problems += _check_schedule(config) + _check_reward(config)
    sizes = [value_of(config, name) for name in AT_LEAST_1]
    if any(size is not None and size < 1 for size in sizes):
        return problems  # reported above; the arithmetic below divides by them
    problems += [problem for group in worker_groups(config) for problem in _check_layout(group)]
    problems += _check_devices(config)
    actor = group_of(config, "actor")
    problems += _check_batching(config, "actor", actor_batching(config), actor)
    if config.needs_critic:
        critic = group_of(config, "critic")
        if critic != actor or critic_batching(config) != actor_batching(config):
            problems += _check_batching(config, "critic", critic_batching(config), critic)
    return problems


def value_of(config: Config, name: str) -> Any:
    """The value under a dotted name; None under a section that is null."""
    return reduce(
        lambda section, key: None if section is None else getattr(section, key),
        name.split("."),
        config,
    )


def _names(config: Config) -> dict[str, tuple[str, ...]]:
    """The values that each choice allows, those of the user's own file included."""
    path = config.algorithm.custom_path
    if path is None:
        return ONE_OF
    from rlhf3d.algorithms.custom import (
        advantage_names,
        policy_loss_names,
    )  # loads torch, as the user's file does

    own = {
        "algorithm.adv_estimator": advantage_names(path),
        "actor.policy_loss": policy_loss_names(path),
    }
    return ONE_OF | {key: tuple(values) for key, values in own.items()}


def _not_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name} = {value!r}: must be one of {', '.join(allowed)}{hint}"


def _check_values(config: Config, names: dict[str, tuple[str, ...]]) -> list[str]:
    ranges: tuple[tuple[list[str], str, Callable[[float], bool]], ...] = (
        (AT_LEAST_1, "at least 1", lambda x: x >= 1),
        (ABOVE_0, "above 0", lambda x: x > 0),
        (NOT_NEGATIVE, "0 or more", lambda x: x >= 0),
        (AT_MOST_1, "at most 1", lambda x: x <= 1),
    )
    problems = [
        f"{name} = {value}: must be {wanted}"
        for names, wanted, holds in ranges
        for name in names
        if (value := value_of(config, name)) is not None and not holds(value)
    ]
    problems += [
        _not_one_of(name, value_of(config, name), allowed)
        for name, allowed in names.items()
        if value_of(config, name) not in allowed
    ]
    for role in ("actor", "critic"):
        optim = value_of(config, f"{role}.optim")
        if not all(0 <= beta < 1 for beta in optim.betas):
            problems.append(f"{role}.optim.betas = {list(optim.betas)}: each must be in [0, 1)")
        if optim.min_lr > optim.lr:
            problems.append(
                f"{role}.optim.min_lr = {optim.min_lr}: above {role}.optim.lr = {optim.lr}"
            )
    if config.actor.clip_ratio_c <= 1:
        problems.append(f"actor.clip_ratio_c = {config.actor.clip_ratio_c}: must be above 1")
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
    """On GPUs: what has devices of its own, one after the other, engines beside the actor, and kernels' wishes."""
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
    rollout, estimator = config.rollout, config.algorithm.adv_estimator
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
    if estimator in GROUP_ESTIMATORS and rollout.n == 1:
        problems.append(
            f"rollout.n = 1: algorithm.adv_estimator = {estimator} compares completions; set 2 or more"
        )
    if config.data.val_max_samples < 1 and config.data.val_max_samples != -1:
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
        from rlhf3d.algorithms.correction import correction_settings  # loads torch

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


def check_files(config: Config) -> list[str]:
    """What the disk lacks of what is named: model (and its fit to the layout), data, reward function."""
    problems = _check_model_folder(config) + _check_output(config)
    for key in ("train_files", "val_files"):
        problems += [
            f"data.{key}: no file {name}; `rlhf3d data prepare --help` shows how to write it"
            for name in value_of(config, f"data.{key}")
            if not Path(name).is_file()
        ]
    path = config.custom_reward_function.path
    if path is not None and not Path(path).is_file():
        problems.append(f"custom_reward_function.path = {path}: no such Python file")
    return problems


def _check_output(config: Config) -> list[str]:
    """The run's folder, and those in it."""
    output = Path(config.trainer.output_dir)
    folders = [
        output,
        *(output / name for name in ("checkpoints", "logs", "samples", "tensorboard")),
    ]
    found = list(dict.fromkeys(filter(None, map(folder_problem, folders))))
    return [
        f"trainer.output_dir = {output}: {problem}; name another folder" for problem in found[:1]
    ]


def _check_model_folder(config: Config) -> list[str]:
    from rlhf3d.models.hf_io import check_weights  # loads torch

    try:
        spec = load_spec(config.model.path)
        check_weights(config.model.path, spec, "lm")
    except ValueError as error:
        return [str(error)]
    return check_model(config, spec)


def check_model(config: Config, spec: ModelSpec, reward: ModelSpec | None = None) -> list[str]:
    """What does not fit the model: lengths, layouts of the worker groups, ranks of an engine.

    The reward model is read, weights included, unless its shape is given.
    """
    problems = []
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    if prompt + response > spec.max_position:
        problems.append(
            f"data.max_prompt_length {prompt} + data.max_response_length {response} = {prompt + response} "
            f"tokens, more than the model's window of {spec.max_position}"
        )
    problems += [
        f"rollout.stop_token_ids holds {token}: the model's tokens are 0 to {spec.vocab_size - 1}"
        for token in config.rollout.stop_token_ids
        if not 0 <= token < spec.vocab_size
    ]
    for group in worker_groups(config):
        try:
            of_group = (reward or load_reward_spec(group.model)) if group.name == "reward" else spec
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            check_layout(of_group, group.layout, group.layout_config.sequence_parallel)
        except ValueError as error:
            problems.append(f"{group.key.removesuffix('layout')}{error}")
    try:
        check_engine_layout(
            spec, config.rollout.tensor_parallel_size, config.rollout.expert_parallel
        )
        check_quantization(spec, config.rollout.quantization)
    except ValueError as error:
        problems.append(str(error))
    return problems
