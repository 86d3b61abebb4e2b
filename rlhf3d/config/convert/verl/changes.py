"""From verl's values to ours, one function for each difference.

Invariant: pure; a value that this package does not know is passed on, so that the loader's message
names the choices.
"""

from __future__ import annotations

from typing import Any

from rlhf3d.config.convert.rules import Change, Drop, Put, model_folder, only_if, same
from rlhf3d.config.convert.verl.layout import (
    MEGATRON_SIZES,
    REWARD,
    REWARD_RANKS,
    A,
    M,
    R,
    context_parallel,
    world,
)
from rlhf3d.config.convert.verl.read import Verl
from rlhf3d.observability.trackers.registry import TRACKERS

CORRECTION = "algorithm.rollout_correction."
_NUMBERS = (
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.total_training_steps",
    "trainer.save_freq",
    R + "nnodes",
    R + "n_gpus_per_node",
    R + "tensor_model_parallel_size",
    R + "top_k",
    *(f"{A}megatron.{size}" for size in MEGATRON_SIZES),
    *(f"critic.megatron.{size}" for size in MEGATRON_SIZES),
    *(f"reward_model.megatron.{size}" for size in MEGATRON_SIZES),
    *REWARD_RANKS,
    *(f"{prefix}nnodes" for prefix in REWARD),
    *(f"{prefix}n_gpus_per_node" for prefix in REWARD),
    A + "ulysses_sequence_parallel_size",
    A + "fsdp_config.ulysses_sequence_parallel_size",
    A + "tis_imp_ratio_cap",
    A + "ppo_micro_batch_size",
    "critic.ppo_micro_batch_size",
    "reward_model.micro_batch_size",
    A + "optim.lr",
    A + "optim.min_lr_ratio",
    A + "optim.lr_warmup_steps_ratio",
    "critic.optim.lr",
    "critic.optim.min_lr_ratio",
    "critic.optim.lr_warmup_steps_ratio",
)
_WORDS = (
    "data.truncation",
    A + "policy_loss.loss_mode",
    CORRECTION + "rollout_rs",
    "trainer.resume_mode",
)
_LISTS = (A + "checkpoint.save_contents", A + "checkpoint.contents")
KINDS = {"a number": ((int, float), _NUMBERS), "a word": (str, _WORDS), "a list": (list, _LISTS)}
"""Keys that the functions below reckon with, look up and look into."""
GROUPS = ("grpo", "rloo", "opo", "reinforce_plus_plus_baseline")
EMPTY_RESPONSES = (
    "an empty response is left out of its group's statistics, and one that is alone in its group "
    "gets advantage 0; verl counts the first, and gives the second its score"
)


def as_list(value: Any, verl: Verl) -> Any:
    """A file or several."""
    return value if isinstance(value, list) else [value]


def not_negative(value: Any, verl: Verl) -> Any:
    """verl's -1 for never is 0 here."""
    return max(value, 0) if isinstance(value, int | float) else value


def same_as_actor_model(value: Any, verl: Verl) -> Any:
    """The critic starts from the actor's model."""
    if value == verl.get(M + "path"):
        return Drop("the critic starts from model.path", same=True)
    return Drop("the critic starts from model.path, with a fresh value head", to_set=True)


def overlong(value: Any, verl: Verl) -> Any:
    """Two keys of verl in one of ours."""
    if verl.get("data.filter_overlong_prompts"):
        return "filter"
    names = {"left": "truncate_left", "right": "truncate_right", "error": "error"}
    cut = verl.get("data.truncation") or "error"
    return names.get(cut, f"truncate_{cut}")


only_with_filter = only_if(
    lambda verl: verl.get("algorithm.filter_groups.enable"),
    "without filter_groups a step generates its train_batch_size prompts",
)
"""Batches of their own exist in dynamic sampling only."""


# Update


def warmup(role: str, prefix: str) -> Change:
    """Steps, or a share of the steps."""

    def change(value: Any, verl: Verl) -> Any:
        steps = verl.get(prefix + "optim.lr_warmup_steps")
        if isinstance(steps, int) and steps > 0:
            return steps
        ratio = verl.get(prefix + "optim.lr_warmup_steps_ratio")
        if not ratio:
            return 0
        total = verl.get("trainer.total_training_steps")
        if total:
            return int(ratio * total)
        return Drop(
            f"a number of steps here: set {role}.optim.lr_warmup_steps to {ratio} x all steps",
            to_set=True,
        )

    return change


def min_lr(prefix: str, lr: float) -> Change:
    """FSDP's is a ratio."""

    def change(value: Any, verl: Verl) -> Any:
        ratio = verl.get(prefix + "optim.min_lr_ratio")
        if ratio is None or verl.is_megatron:
            return verl.get(prefix + "optim.min_lr") or 0.0
        return ratio * (verl.get(prefix + "optim.lr") or lr)

    return change


def per_gpu(value: Any, verl: Verl) -> Any:
    """Old keys without _per_gpu count over all GPUs."""
    return Put(max(int(value) // world(verl), 1), "of one data-parallel rank; verl's, of all GPUs")


def tokens_per_rank(value: Any, verl: Verl) -> Any:
    """verl counts the tokens of one GPU, also where a sequence is divided."""
    size = context_parallel(verl)
    if size == 1:
        return value
    return Put(value * size, f"of all {size} ranks that share a sequence; verl's, of one")


def clip_ratio(value: Any, verl: Verl) -> Any:
    """verl's low and high have defaults of their own."""
    if verl.get(A + "clip_ratio_low") is not None and verl.get(A + "clip_ratio_high") is not None:
        return value
    return Put(value, "default of low and high; verl's versions with those keys take 0.2 for them")


def clip_low(value: Any, verl: Verl) -> Any:
    """The lower bound of a ratio is 1 - this."""
    if isinstance(value, int | float) and value > 1:
        return Put(1.0, f"1 is no lower bound, as is verl's {value}")
    return value


def policy_loss(value: Any, verl: Verl) -> Any:
    """verl's bypass mode has a loss of its own."""
    if verl.get(CORRECTION + "bypass_mode") and verl.get(CORRECTION + "loss_type") == "reinforce":
        return Put("cispo", "its truncated ratio is the weight of verl's loss_type reinforce")
    name = {None: "vanilla", "gpg": "pg"}.get(value, value)
    if name == "gspo":
        return Put("gspo", "no dual clip: actor.clip_ratio_c is not used")
    return name


def aggregation(value: Any, verl: Verl) -> Any:
    """GSPO's is by sequence; an old key chose between two."""
    gspo = verl.get(A + "policy_loss.loss_mode") == "gspo"
    value = verl.get(A + "loss_agg_mode")  # `value` may be that of the old key
    if value is None and verl.get(A + "use_token_level_loss") is False:
        return "seq-mean-token-mean"
    if gspo and value in (None, "token-mean"):
        return Put(
            "seq-mean-token-mean" if value is None else value,
            "GSPO's paper, and verl whatever this key said before it was read for GSPO, take "
            "seq-mean-token-mean",
        )
    if value == "seq-mean-token-sum-norm":
        return Put(value, "also divided by the number of sequences: compare the learning rate")
    return value or "token-mean"


# Advantages and corrections


def estimator(value: Any, verl: Verl) -> Any:
    """The same names; groups differ in their empty responses."""
    name = str(value).removesuffix("_vectorized")
    return Put(name, EMPTY_RESPONSES) if name in GROUPS else name


def kl_coef(value: Any, verl: Verl) -> Any:
    """Early versions had no switch."""
    if value and verl.get("algorithm.use_kl_in_reward") is None:
        return Put(value, "not used unless algorithm.use_kl_in_reward; verl's first versions did")
    return value


def generations(value: Any, verl: Verl) -> Any:
    """verl's 0 is no limit."""
    if isinstance(value, int) and value <= 0:
        return Drop("a limit is needed here: the default stands")
    return value


def importance_weights(value: Any, verl: Verl) -> Any:
    """Also what the key was before there was a section for it."""
    if verl.get(CORRECTION + "bypass_mode"):
        return Drop("with bypass_mode the loss's own ratio is the correction", same=True)
    cap = verl.get(A + "tis_imp_ratio_cap")
    level = verl.get(CORRECTION + "rollout_is")  # `value` may be that of the old key
    if not level:
        return "token" if cap and cap > 0 else None
    return level


def importance_threshold(value: Any, verl: Verl) -> Any:
    """The cap of truncated weights."""
    cap = verl.get(A + "tis_imp_ratio_cap")
    if value is None:
        value = cap if cap and cap > 0 else 2.0
    return value


def rejection(value: Any, verl: Verl) -> Any:
    """Old names said what is compared, not how."""
    if value is None:
        return None
    if verl.get(CORRECTION + "bypass_mode"):
        return Drop("no rejection with bypass_mode: choose one of the two", to_set=True)
    return _OLD_REJECTION.get(value, value)


_OLD_REJECTION = {"token": "token_k1", "sequence": "seq_sum_k1", "geometric": "seq_mean_k1"}


def rejection_threshold(value: Any, verl: Verl) -> Any:
    """verl's code bounds 1/r where k1 is meant to bound r."""
    rules = verl.get(CORRECTION + "rollout_rs")
    value = verl.get(CORRECTION + "rollout_rs_threshold")
    if value is None or rules is None or verl.get(CORRECTION + "bypass_mode"):
        return None
    if rules in _OLD_REJECTION:
        lower = verl.get(CORRECTION + "rollout_rs_threshold_lower")
        return value if lower is None else f"{lower}_{value}"
    kinds, limits = str(rules).split(","), str(value).split(",")
    if len(limits) == 1:
        limits = limits * len(kinds)
    turned = []
    for kind, limit in zip(kinds, limits, strict=False):
        turned.append(_inverse(limit) if kind.strip().endswith("_k1") else limit.strip())
    text = ",".join(turned)
    if text == ",".join(limits):
        return value
    return Put(text, f"k1 bounds r here; verl's code bounds 1/r, so its {value} is this range")


def _inverse(limit: str) -> str:
    """The range of r where that of 1/r is `limit`; a single number means its own inverse."""
    low, _, high = limit.strip().partition("_")
    if not high:
        return limit.strip()
    return f"{1 / float(high):.6g}_{1 / float(low):.6g}"


# Rewards, rollout, trainer


def _has_reward_model(verl: Verl) -> Any:
    return verl.get("reward.reward_model.enable", "reward_model.enable")


def reward_model_weights(value: Any, verl: Verl) -> Any:
    """verl takes a reward model's score instead of the rule's."""
    return {"reward_model": 1.0} if _has_reward_model(verl) else {"accuracy": 1.0}


def if_reward_model(change: Change = same) -> Change:
    """Only where it is enabled."""
    return only_if(_has_reward_model, "the reward model is off", change)


def reward_folder(value: Any, verl: Verl) -> Any:
    """Its folder."""
    folder = model_folder(value, verl)
    told = "a Llama or Qwen2 classifier with one output"
    if isinstance(folder, Put):
        return Put(folder.value, f"{told}; {folder.differs}")
    return Put(folder, told)


if_custom_reward = only_if(
    lambda verl: verl.get("reward.custom_reward_function.path", "custom_reward_function.path"),
    "no file is given",
)
"""The function's name without a file is nothing."""


def greedy(value: Any, verl: Verl) -> Any:
    """verl validates one way, greedy unless it samples."""
    return not value


def validation_samples(value: Any, verl: Verl) -> Any:
    """Only where verl's validation samples."""
    if verl.get(R + "val_kwargs.do_sample"):
        return value
    return Drop("validation is greedy: one completion per prompt", same=value == 1)


validation_sampling = only_if(
    lambda verl: verl.get(R + "val_kwargs.do_sample"), "validation is greedy"
)
"""Only where verl's validation samples."""


def sampled_n(value: Any, verl: Verl) -> Any:
    """verl's default is one."""
    return (value or 1) if verl.get(R + "val_kwargs.do_sample") else 0


def engine_name(value: Any, verl: Verl) -> Any:
    """There is one engine here."""
    if value == "vllm":
        return Drop("vLLM is the engine", same=True)
    return Drop("vLLM is the engine here")


def expert_parallel(value: Any, verl: Verl) -> Any:
    """A switch here."""
    return isinstance(value, int) and value > 1


def quantization(value: Any, verl: Verl) -> Any:
    """vLLM's name of the one that is offered."""
    if value == "fp8":
        return Put("fp8_per_channel", "scales by channel; needs a rollout correction and tp 1")
    return value


def trackers(value: Any, verl: Verl) -> Any:
    """Those that are offered here; verl's `console` is always on."""
    asked = value if isinstance(value, list) else [value or "console"]
    known = [name for name in asked if name in TRACKERS]
    missing = [name for name in asked if name not in (*known, "console")]
    if missing:
        return Put(known, f"not offered: {', '.join(map(str, missing))}")
    return known or Drop("the terminal is always written", same=True)


def output_dir(value: Any, verl: Verl) -> Any:
    """verl's folder of checkpoints; a run here writes everything into one folder."""
    folder = verl.get("trainer.default_local_dir")
    if folder:
        return folder
    project = verl.get("trainer.project_name") or "verl_examples"
    return f"runs/{project}/{verl.get('trainer.experiment_name') or 'gsm8k'}"


def save_at_end(value: Any, verl: Verl) -> Any:
    """verl saves nothing where it does not save on the way."""
    return (verl.get("trainer.save_freq") or -1) > 0


def resume(value: Any, verl: Verl) -> Any:
    """The folder of a checkpoint is one of ours."""
    if value == "resume_path":
        return Drop(
            "a checkpoint of verl cannot be continued: merge it to a Hugging Face folder and set "
            "model.path",
            to_set=True,
        )
    return {"disable": "never"}.get(value, value)


def saves_optimizer(value: Any, verl: Verl) -> Any:
    """Whether checkpoints hold it."""
    return "optimizer" in value
