"""From TRL's values to ours, one function for each difference.

Invariant: pure; a value that this package does not know is passed on, so that the loader's message
names the choices.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf3d.config.convert.rules import NEVER_REACHED, Change, Drop, Put, only_if, renamed
from rlhf3d.config.convert.trl.read import Trl
from rlhf3d.observability.trackers.registry import TRACKERS

_COUNTS = (
    "gradient_accumulation_steps",
    "generation_batch_size",
    "max_steps",
    "max_tool_calling_iterations",
    "num_generations",
    "num_generations_eval",
    "num_iterations",
    "num_machines",
    "num_processes",
    "per_device_train_batch_size",
    "steps_per_generation",
    "vllm_tensor_parallel_size",
)
_NUMBERS = (
    "adam_beta1",
    "adam_beta2",
    "beta",
    "epsilon_high",
    "eval_steps",
    "learning_rate",
    "logging_steps",
    "lr_scheduler_kwargs.min_lr",
    "lr_scheduler_kwargs.min_lr_rate",
    "num_train_epochs",
    "save_steps",
    "vllm_importance_sampling_cap",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "warmup_ratio",
    "warmup_steps",
)
_WORDS = ("loss_type", "lr_scheduler_type", "importance_sampling_level", "vllm_mode")
KINDS = {
    "a whole number": (int, _COUNTS),
    "a number": ((int, float), _NUMBERS),
    "a word": (str, _WORDS),
}
"""Keys that the functions below reckon with, or look up."""
_GPUS_A_NODE = 8


# Sizes


def processes(trl: Trl) -> int:
    """Processes that train; accelerate says it, not TRL."""
    return max(int(trl.get("num_processes") or 1), 1)


def _completions(trl: Trl) -> int:
    """Of one generation."""
    given = trl.values.get("generation_batch_size")
    steps = trl.values.get("steps_per_generation") or trl.get("gradient_accumulation_steps")
    each = trl.get("per_device_train_batch_size") * processes(trl)
    return int(given or each * steps)


def _update(trl: Trl) -> int:
    """Completions of one optimizer step."""
    each = trl.get("per_device_train_batch_size") * processes(trl)
    return int(each * trl.get("gradient_accumulation_steps"))


def _optimizer_steps(trl: Trl) -> float:
    """In one of our steps; TRL counts all of its steps in them."""
    updates = max(_completions(trl) / max(_update(trl), 1), 1.0)
    return float(updates * (trl.get("num_iterations") or 1))


def train_batch(value: Any, trl: Trl) -> Any:
    """Prompts of a generation."""
    return _prompts(max(_completions(trl), _update(trl)), "generates", trl)


def mini_batch(value: Any, trl: Trl) -> Any:
    """Prompts of an optimizer step."""
    return _prompts(_update(trl), "updates on", trl)


def _prompts(completions: int, does: str, trl: Trl) -> Any:
    each = max(trl.get("num_generations"), 1)
    prompts = max(completions // each, 1)
    if completions % each == 0:
        return prompts
    return Put(prompts, f"of whole prompts; TRL {does} {completions} completions, {each} a prompt")


def accelerate_processes(value: Any, trl: Trl) -> Any:
    """What accelerate is told, which TRL's own files do not say."""
    if trl.values.get("num_processes") is None:
        return Drop(
            "accelerate's number of processes multiplies the batch: 1 is taken, give "
            "num_processes=N",
            to_set=True,
        )
    return Drop("the GPUs of actor.layout.dp", same=True)


def nodes(value: Any, trl: Trl) -> Any:
    """accelerate's machines."""
    return trl.get("num_machines") or math.ceil(processes(trl) / _GPUS_A_NODE)


def gpus_of_a_node(value: Any, trl: Trl) -> Any:
    """Those that train, and one server's."""
    gpus = math.ceil(processes(trl) / nodes(value, trl))
    return gpus + trl.get("vllm_tensor_parallel_size") if _is_server(trl) else gpus


def _in_our_steps(steps: float, trl: Trl) -> Any:
    each = _optimizer_steps(trl)
    ours = max(math.ceil(steps / each), 1)
    if each == 1:
        return ours
    return Put(ours, f"steps of {each:g} optimizer steps; TRL counts optimizer steps")


def total_steps(value: Any, trl: Trl) -> Any:
    """max_steps; -1 is none."""
    if value is None or value <= 0:
        return Drop("the epochs decide", same=True)
    return _in_our_steps(value, trl)


def epochs(value: Any, trl: Trl) -> Any:
    """TRL's may be a part of one."""
    whole = max(math.ceil(value), 1)
    return whole if whole == value else Put(whole, "whole epochs; TRL takes parts")


def save_freq(value: Any, trl: Trl) -> Any:
    """By steps, or not at all."""
    if trl.get("save_strategy") == "no":
        return 0
    return _every("save", trl.get("save_strategy"), trl.get("save_steps"), trl)


def test_freq(value: Any, trl: Trl) -> Any:
    """By steps, or not at all."""
    strategy = trl.get("eval_strategy")
    if strategy in ("no", False):  # YAML's no
        return 0
    return _every("test", strategy, trl.get("eval_steps") or trl.get("logging_steps"), trl)


def _every(what: str, strategy: str, steps: float, trl: Trl) -> Any:
    key = f"trainer.{what}_freq"
    if strategy != "steps":
        return Drop(f"a number of steps here: set {key} (TRL: {strategy})", to_set=True)
    if steps < 1:
        return Drop(f"a number of steps here: set {key} to {steps} x all steps", to_set=True)
    return _in_our_steps(steps, trl)


def validation_samples(value: Any, trl: Trl) -> Any:
    """TRL's evaluation samples."""
    if trl.get("eval_strategy") in ("no", False):
        return Drop("TRL does not evaluate", same=True)
    return trl.values.get("num_generations_eval") or trl.get("num_generations")


def validation_greedy(value: Any, trl: Trl) -> Any:
    """It does not decode greedily."""
    if trl.get("eval_strategy") in ("no", False):
        return Drop("TRL does not evaluate", same=True)
    return False


# Update


def warmup(value: Any, trl: Trl) -> Any:
    """Steps, or a share of the steps."""
    steps, share = trl.values.get("warmup_steps") or 0, trl.values.get("warmup_ratio") or 0
    if 0 < steps < 1:
        steps, share = 0, steps
    if steps:
        return _in_our_steps(steps, trl)
    if not share:
        return 0
    total = trl.values.get("max_steps") or 0
    if total > 0:
        return _in_our_steps(share * total, trl)
    return Drop(
        f"a number of steps here: set actor.optim.lr_warmup_steps to {share} x all steps",
        to_set=True,
    )


_DECAYS = {
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
}


def decay(value: Any, trl: Trl) -> Any:
    """The shape of the schedule."""
    return _DECAYS.get(value, value)


def min_lr(value: Any, trl: Trl) -> Any:
    """A rate, or a share of the peak."""
    share = trl.values.get("lr_scheduler_kwargs.min_lr_rate")
    if share is None:
        return trl.values.get("lr_scheduler_kwargs.min_lr") or 0.0
    return share * trl.get("learning_rate")


def betas(value: Any, trl: Trl) -> Any:
    """Two keys of TRL in one of ours."""
    return [trl.get("adam_beta1"), trl.get("adam_beta2")]


def adamw(value: Any, trl: Trl) -> Any:
    """The optimizer here."""
    if str(value).startswith("adamw_torch"):
        return Drop("AdamW, with moments in float32", same=True)
    return Drop("AdamW, with moments in float32: another learning rate may be needed", to_set=True)


def dtype(value: Any, trl: Trl) -> Any:
    """Of the computation; weights are kept in float32 beside it."""
    if trl.get("fp16"):
        return Drop("bfloat16 or float32: set model.dtype", to_set=True)
    return "float32" if value is False else "auto"


recompute = renamed({True: "full", False: "none"})
"""Whole layers, or nothing."""


# Loss


def kl_coef(value: Any, trl: Trl) -> Any:
    """TRL's beta of 0 is no reference at all."""
    return value if value else Drop("0: no KL and no reference", same=True)


def use_kl(value: Any, trl: Trl) -> Any:
    """Where beta is above 0."""
    return bool(trl.get("beta"))


def kl_type(value: Any, trl: Trl) -> Any:
    """The estimator is k3; what differs is its gradient."""
    if not trl.get("beta"):
        return Drop("no KL", same=True)
    if not trl.get("use_bias_correction_kl"):
        return "low_var_kl"
    return Put("low_var_kl+", "k3's value with k2's gradient: unbiased as TRL's weighted KL is")


def policy_loss(value: Any, trl: Trl) -> Any:
    """Two keys of TRL in one of ours."""
    loss = trl.get("loss_type")
    if loss in ("grpo", "dapo", "bnpo", "dr_grpo"):
        return "gspo" if trl.get("importance_sampling_level") == "sequence" else "vanilla"
    if loss == "cispo" and trl.get("importance_sampling_level") == "sequence":
        return Drop("cispo has ratios of tokens here", to_set=True)
    return loss


_AGGREGATION = {
    "cispo": "token-mean",
    "dapo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


def aggregation(value: Any, trl: Trl) -> Any:
    """TRL's losses are also ways to aggregate."""
    if value == "bnpo":
        return Put("token-mean", "over the mini-batch; TRL averages the means of micro-batches")
    return _AGGREGATION.get(value, Drop("of a loss that is not offered", same=True))


def clip_low(value: Any, trl: Trl) -> Any:
    """TRL's cispo has no lower bound."""
    return 1.0 if trl.get("loss_type") == "cispo" else None


def clip_high(value: Any, trl: Trl) -> Any:
    """TRL's cispo has the largest ratio in the place of the distance from 1."""
    if trl.get("loss_type") != "cispo":
        return value
    largest = trl.get("epsilon_high") or trl.get("epsilon") or 0.2
    if largest <= 1:
        return Drop(f"TRL's cispo cuts all ratios at {largest}: set epsilon_high above 1", True)
    return Put(largest - 1.0, f"1 + this is the largest ratio, {largest:g}")


def dual_clip(value: Any, trl: Trl) -> Any:
    """TRL's delta is the bound of a dual clip."""
    if trl.get("loss_type") == "cispo" or trl.get("importance_sampling_level") == "sequence":
        return Drop("this loss has no dual clip", same=True)
    if value is not None:
        return Put(value, "for A < 0 a loss of at most -A times this, as in TRL")
    return Put(NEVER_REACHED, "a bound that is never reached: TRL has none unless delta is set")


def scaled(value: Any, trl: Trl) -> Any:
    """By the group, or not."""
    if value == "batch":
        return Drop(
            "the standard deviation of the batch is not offered: group or none, or the estimator "
            "reinforce_plus_plus_baseline, which whitens over the batch",
            to_set=True,
        )
    return renamed({"group": True, "none": False})(value, trl)


# Importance sampling


def corrected(change: Change) -> Change:
    """For keys of the correction, which TRL makes with vLLM only."""
    keys = ("use_vllm", "vllm_importance_sampling_correction")
    return only_if(lambda trl: all(map(trl.get, keys)), "TRL corrects nothing here", change)


def level(value: Any, trl: Trl) -> Any:
    """token_… or sequence_…."""
    return str(trl.get("vllm_importance_sampling_mode")).partition("_")[0]


def threshold(value: Any, trl: Trl) -> Any:
    """One number truncates, a range sets those outside to 0."""
    high = trl.values.get("vllm_importance_sampling_cap")
    if high is None:
        high = trl.get("vllm_importance_sampling_clip_max")
    low = trl.values.get("vllm_importance_sampling_clip_min")
    if str(trl.get("vllm_importance_sampling_mode")).endswith("mask"):
        return Put(f"{low or 1e-9:g}_{high:g}", "weights outside become 0, as in TRL")
    if low:
        return Put(high, f"weights are truncated above; TRL raises those below {low} too")
    return high


# Rollout


def _is_server(trl: Trl) -> bool:
    return bool(trl.get("use_vllm") and trl.get("vllm_mode") == "server")


def engines(value: Any, trl: Trl) -> Any:
    """One server, or engines on the processes that train."""
    if not trl.get("use_vllm"):
        return Put(processes(trl), "vLLM generates here; TRL's transformers, without use_vllm")
    if _is_server(trl):
        return Put(1, "the server's: set it and rollout.tensor_parallel_size as trl vllm-serve has")
    return max(processes(trl) // max(trl.get("vllm_tensor_parallel_size"), 1), 1)


def placement(value: Any, trl: Trl) -> Any:
    """A server has GPUs of its own."""
    return "disaggregated" if _is_server(trl) else "colocated"


def with_vllm(value: Any, trl: Trl) -> Any:
    """Settings of engines that share their GPUs with training."""
    if trl.get("use_vllm") and not _is_server(trl):
        return value
    return Drop("TRL's engines are not here", same=True)


def turns(value: Any, trl: Trl) -> Any:
    """Calls of tools, and the answer after the last."""
    if not trl.get("tools", "environment_factory"):
        return Drop("no tools", same=True)
    return value + 1


# Rewards and the rest

_PARTS = {
    "accuracy_reward": "accuracy",
    "reasoning_accuracy_reward": "accuracy",
    "think_format_reward": "format",
}


def reward_weights(value: Any, trl: Trl) -> Any:
    """TRL's own functions have counterparts; others are the user's."""
    functions = trl.get("reward_funcs") or []
    functions = functions if isinstance(functions, list) else [functions]
    names = [_PARTS.get(str(name).rpartition(".")[2]) for name in functions]
    weights = trl.get("reward_weights") or [1.0] * len(functions)
    if None in names or any(":" in str(name) for name in functions):
        return Drop(
            "functions of your own: one compute_score(data_source, solution_str, ground_truth, "
            "extra_info) in custom_reward_function.path (docs/rewards.md)",
            to_set=True,
        )
    found = dict(zip(names, weights, strict=False))
    if trl.get("reward_model_name_or_path"):
        found["reward_model"] = 1.0
    return found or {"accuracy": 1.0}


def reward_format(value: Any, trl: Trl) -> Any:
    """TRL's format is a block of thought."""
    used = "think_format_reward" in str(trl.get("reward_funcs") or "")
    return "think" if used else Drop("no reward for a format", same=True)


def trackers(value: Any, trl: Trl) -> Any:
    """Those that are offered here."""
    asked = value if isinstance(value, list) else [value]
    asked = [name for name in asked if name not in ("none", None)]
    known = [name for name in asked if name in TRACKERS]
    missing = [str(name) for name in asked if name not in known]
    if missing:
        return Put(known, f"not offered: {', '.join(missing)}")
    return known
