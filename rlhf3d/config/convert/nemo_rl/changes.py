"""From NeMo-RL's values to ours, one function for each difference.

Invariant: pure; a value that this package does not know is passed on, so that the loader's message
names the choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf3d.config.convert.nemo_rl.read import MEGATRON, TORCH, Nemo, P
from rlhf3d.config.convert.rules import NEVER_REACHED, Change, Drop, Put, only_if, renamed, same

VLLM = P + "generation.vllm_cfg."
COLOCATED = P + "generation.colocated."
SIZES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
}
_COUNTS = (
    "cluster.gpus_per_node",
    "cluster.num_nodes",
    "data.max_input_seq_length",
    "grpo.async_grpo.max_trajectory_age_steps",
    "grpo.batch_multiplier",
    "grpo.max_num_epochs",
    "grpo.max_num_steps",
    "grpo.num_generations_per_prompt",
    "grpo.num_prompts_per_step",
    *(f"{MEGATRON}{size}" for size in SIZES),
    *(f"{section}tensor_parallel_size" for section in TORCH),
    *(f"{section}context_parallel_size" for section in TORCH),
    P + "dynamic_batching.train_mb_tokens",
    P + "generation.max_new_tokens",
    P + "max_total_sequence_length",
    P + "sequence_packing.train_mb_tokens",
    P + "train_global_batch_size",
    COLOCATED + "resources.gpus_per_node",
    COLOCATED + "resources.num_nodes",
    VLLM + "pipeline_parallel_size",
    VLLM + "tensor_parallel_size",
)
_NUMBERS = (
    "loss_fn.ratio_clip_min",
    "loss_fn.reference_policy_kl_penalty",
    "loss_fn.truncated_importance_sampling_ratio",
    "loss_fn.truncated_importance_sampling_ratio_min",
    MEGATRON + "optimizer.adam_beta1",
    MEGATRON + "optimizer.adam_beta2",
)
KINDS = {
    "a whole number": (int, _COUNTS),
    "a number": ((int, float), _NUMBERS),
    "a word": (str, ("loss_fn.truncated_importance_sampling_type",)),
}
"""Keys that the functions below reckon with, or look up."""
NO_LIMIT = 1_000_000
"""NeMo-RL's recipes mean no limit by so many steps."""


def of_megatron(change: Change = same) -> Change:
    """Keys of Megatron's section, where it trains."""
    return only_if(lambda nemo: nemo.is_megatron, "Megatron is off", change)


def of_torch(change: Change = same) -> Change:
    """Keys of the other backend, where that trains."""
    return only_if(lambda nemo: not nemo.is_megatron, "Megatron trains", change)


def asked_if_on(note: str) -> Change:
    """A switch of something that is not offered."""
    return lambda value, nemo: Drop(note, to_set=bool(value), same=not value)


# Layout and devices


def _sizes(nemo: Nemo) -> dict[str, int]:
    if nemo.is_megatron:
        return {ours: nemo.get(MEGATRON + name) or 1 for name, ours in SIZES.items()}
    names = {"tp": "tensor_parallel_size", "cp": "context_parallel_size"}
    return {"pp": 1} | {ours: nemo.of_torch(name) or 1 for ours, name in names.items()}


def _gpus(nemo: Nemo) -> int:
    return int(nemo.get("cluster.gpus_per_node") * nemo.get("cluster.num_nodes"))


def is_apart(nemo: Nemo) -> bool:
    """Whether engines have GPUs of their own."""
    return nemo.get(COLOCATED + "enabled") is False


def _engine_gpus(nemo: Nemo) -> int:
    """GPUs that generate."""
    if not is_apart(nemo):
        return _gpus(nemo)
    each = nemo.get(COLOCATED + "resources.gpus_per_node") or nemo.get("cluster.gpus_per_node")
    return int(each * (nemo.get(COLOCATED + "resources.num_nodes") or 1))


def data_parallel(value: Any, nemo: Nemo) -> Any:
    """What is left of the GPUs that train."""
    gpus = _gpus(nemo) - (_engine_gpus(nemo) if is_apart(nemo) else 0)
    sizes = _sizes(nemo)
    ours = max(gpus // max(sizes["tp"] * sizes["pp"] * sizes["cp"], 1), 1)
    if nemo.is_megatron:
        return ours
    return Put(
        ours,
        "FSDP shards weights over the replicas, this package over tp and pp: `rlhf3d plan CONFIG "
        "--search` finds those that fit",
    )


def sequence_parallel(value: Any, nemo: Nemo) -> Any:
    """Without effect at tp 1."""
    return bool(value and _sizes(nemo)["tp"] > 1)


recompute = renamed({True: "full", False: "none"})
"""Whole layers, or nothing."""


def placement(value: Any, nemo: Nemo) -> Any:
    """Engines with GPUs of their own."""
    return "disaggregated" if is_apart(nemo) else "colocated"


def engines(value: Any, nemo: Nemo) -> Any:
    """What the GPUs that generate hold."""
    return max(_engine_gpus(nemo) // max(nemo.get(VLLM + "tensor_parallel_size") or 1, 1), 1)


def one_stage(value: Any, nemo: Nemo) -> Any:
    """An engine has no pipeline here."""
    return Drop("an engine is rollout.tensor_parallel_size ranks", to_set=value != 1, same=True)


# Sizes


def mini_batch(value: Any, nemo: Nemo) -> Any:
    """NeMo-RL counts completions."""
    each = max(nemo.get("grpo.num_generations_per_prompt") or 1, 1)
    prompts = max(value // each, 1)
    if value % each == 0:
        return prompts
    return Put(prompts, f"of whole prompts; NeMo-RL updates on {value} completions, {each} each")


def response_length(value: Any, nemo: Nemo) -> Any:
    """NeMo-RL bounds prompt and response together."""
    total, prompt = nemo.get(P + "max_total_sequence_length"), nemo.get("data.max_input_seq_length")
    if not total or not prompt:
        return value
    if prompt < total:
        return min(value, total - prompt)
    return Put(
        value,
        f"of the response alone; NeMo-RL bounds prompt and response together by {total}: set this "
        "and data.max_prompt_length to what they need",
    )


def token_budget(value: Any, nemo: Nemo) -> Any:
    """Tokens of a micro-batch, which must hold the longest sequence."""
    packs = nemo.get(P + "sequence_packing.enabled")
    section = "sequence_packing" if packs else "dynamic_batching"
    tokens = nemo.get(f"{P}{section}.train_mb_tokens")
    if not any_budget(True, nemo) or tokens is None:
        return Drop("micro-batches are counted in sequences", same=True)
    made = response_length(nemo.get(P + "generation.max_new_tokens") or 0, nemo)
    response = made.value if isinstance(made, Put) else made
    longest = (nemo.get("data.max_input_seq_length") or 0) + response
    if tokens >= longest:
        return tokens
    return Put(longest, f"a prompt and a response of full length; NeMo-RL's, {tokens}")


def any_budget(value: Any, nemo: Nemo) -> Any:
    """Both ways of NeMo-RL's cut micro-batches by tokens."""
    ways = ("sequence_packing", "dynamic_batching")
    return any(nemo.get(f"{P}{way}.enabled") for way in ways)


def total_steps(value: Any, nemo: Nemo) -> Any:
    """The first of epochs and steps that is reached ends a run there."""
    if value is None or value < 0 or value >= NO_LIMIT:
        return Drop("the epochs decide", same=True)
    if nemo.get("grpo.max_num_epochs"):
        return Put(value, "also beyond grpo.max_num_epochs; NeMo-RL ends at the first of both")
    return value


# Update

_LR = "torch.optim.lr_scheduler."


def _schedules(nemo: Nemo) -> dict[str, Mapping[str, Any]]:
    """torch's schedules by name, with their arguments."""
    listed = nemo.get(P + "scheduler")
    found: dict[str, Mapping[str, Any]] = {}
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, dict) and "name" in item:
            kwargs = item.get("kwargs")
            name = str(item["name"]).removeprefix(_LR)
            found[name] = kwargs if isinstance(kwargs, dict) else {}
    return found


def warmup(value: Any, nemo: Nemo) -> Any:
    """torch's linear schedule is a warm-up."""
    linear = _schedules(nemo).get("LinearLR", {})
    steps = linear.get("total_iters", 0)
    return Put(steps, "from 0, not from start_factor") if steps else 0


def decay(value: Any, nemo: Nemo) -> Any:
    """What comes behind the warm-up."""
    known = {"CosineAnnealingLR": "cosine", "ConstantLR": "constant", "LinearLR": "constant"}
    names = list(_schedules(nemo))
    other = [name for name in names if name not in known]
    if other:
        return Drop(f"{other[0]} is not offered: set actor.optim.lr_decay_style", to_set=True)
    return "cosine" if "CosineAnnealingLR" in names else "constant"


def torch_min_lr(value: Any, nemo: Nemo) -> Any:
    """A cosine's end."""
    return _schedules(nemo).get("CosineAnnealingLR", {}).get("eta_min", 0.0)


def warmup_init(value: Any, nemo: Nemo) -> Any:
    """A warm-up begins at 0 here."""
    return Drop("the warm-up begins at 0", same=not value)


def betas(value: Any, nemo: Nemo) -> Any:
    """Two keys of Megatron in one of ours."""
    names = ("adam_beta1", "adam_beta2")
    first, second = (nemo.get(f"{MEGATRON}optimizer.{name}") for name in names)
    if first is None and second is None:
        return Drop("Adam's own", same=True)
    return [first or 0.9, second or 0.999]


def adam(value: Any, nemo: Nemo) -> Any:
    """The optimizer here."""
    if str(value) in ("adam", "torch.optim.AdamW", "torch.optim.Adam"):
        return Drop("AdamW", same=True)
    return Drop("AdamW: another learning rate may be needed", to_set=True)


# Loss

KL = "loss_fn.reference_policy_kl_penalty"


def kl_in_reward(nemo: Nemo) -> bool:
    """Whether the KL is in the reward."""
    return bool(nemo.get("loss_fn.use_kl_in_reward") and nemo.get(KL))


def kl_loss(value: Any, nemo: Nemo) -> Any:
    """Whether it is in the loss."""
    return bool(nemo.get(KL)) and not kl_in_reward(nemo)


def kl_loss_coef(value: Any, nemo: Nemo) -> Any:
    """In the loss."""
    return value if kl_loss(value, nemo) else Drop("no KL in the loss", same=True)


def kl_reward_coef(value: Any, nemo: Nemo) -> Any:
    """In the reward."""
    return nemo.get(KL) if kl_in_reward(nemo) else Drop("no KL in the reward", same=True)


def kl_type(value: Any, nemo: Nemo) -> Any:
    """k1, k2 and k3 have verl's names too."""
    if not nemo.get(KL):
        return Drop("no KL", same=True)
    name = {"k3": "low_var_kl"}.get(str(value), value)
    if nemo.get("loss_fn.use_on_policy_kl_approximation") and not kl_in_reward(nemo):
        return Put(f"{name}+", "its value, with k2's gradient in the place of weights on the KL")
    return name


def policy_loss(value: Any, nemo: Nemo) -> Any:
    """Three switches of NeMo-RL in one key of ours."""
    switches = {
        "disable_ppo_ratio": "pg",
        "use_cispo": "cispo",
        "sequence_level_importance_ratios": "gspo",
    }
    on = [ours for name, ours in switches.items() if nemo.get(f"loss_fn.{name}")]
    return on[0] if on else "vanilla"


def clip_low(value: Any, nemo: Nemo) -> Any:
    """The lower bound of a ratio is 1 - this."""
    return Put(1.0, f"1 is no lower bound, as is {value}") if value > 1 else value


def dual_clip(value: Any, nemo: Nemo) -> Any:
    """None in NeMo-RL unless it is given."""
    if policy_loss(None, nemo) != "vanilla":
        return Drop("this loss has no dual clip", same=True)
    if value is not None:
        return value
    return Put(NEVER_REACHED, "a bound that is never reached: NeMo-RL has none without the key")


aggregation = renamed({True: "token-mean", False: "seq-mean-token-mean"})
"""By token, or by sequence."""


def estimator(value: Any, nemo: Nemo) -> Any:
    """grpo's switches choose among ours."""
    name = value or "grpo"
    if name == "reinforce_plus_plus":
        minus = nemo.get("grpo.adv_estimator.minus_baseline")
        return "reinforce_plus_plus" if minus is False else "reinforce_plus_plus_baseline"
    if name != "grpo" or not _estimator_key("use_leave_one_out_baseline", nemo):
        return name
    if not _estimator_key("normalize_rewards", nemo):
        return "rloo"
    return Put(
        "grpo",
        "mean and standard deviation of the whole group; NeMo-RL leaves the completion itself out",
    )


def normalized(value: Any, nemo: Nemo) -> Any:
    """Of grpo only."""
    made = estimator(nemo.get("grpo.adv_estimator.name"), nemo)
    name = made.value if isinstance(made, Put) else made
    return bool(value) if name == "grpo" else Drop(f"of grpo; here {name}", same=True)


def _estimator_key(name: str, nemo: Nemo) -> Any:
    return nemo.get(f"grpo.adv_estimator.{name}", f"grpo.{name}")


_TRUNCATED = "loss_fn.truncated_importance_sampling_"


def threshold(value: Any, nemo: Nemo) -> Any:
    """Truncated, within a range, or not at all."""
    high, low = (nemo.get(f"{_TRUNCATED}{name}") for name in ("ratio", "ratio_min"))
    kind = nemo.get(f"{_TRUNCATED}type")
    if kind == "icepop" and high:
        return Put(f"{low or 1e-9:g}_{high:g}", "weights outside become 0, as in NeMo-RL")
    if kind == "seq-mask-tis" or not high:
        return Put(NEVER_REACHED, "NeMo-RL's weights are not truncated")
    if low:
        return Put(high, f"weights are truncated above; NeMo-RL raises those below {low} too")
    return high


def level(value: Any, nemo: Nemo) -> Any:
    """Weights of tokens, or of sequences with GSPO."""
    return "sequence" if nemo.get("loss_fn.sequence_level_importance_ratios") else "token"


def rejection(value: Any, nemo: Nemo) -> Any:
    """NeMo-RL masks sequences by the geometric mean of their ratios."""
    return "seq_mean_k1" if nemo.get(f"{_TRUNCATED}type") == "seq-mask-tis" else None


def rejection_range(value: Any, nemo: Nemo) -> Any:
    """Of that mean."""
    if rejection(value, nemo) is None:
        return None
    low, high = (nemo.get(f"{_TRUNCATED}{name}") for name in ("ratio_min", "ratio"))
    return f"{low:g}_{high:g}" if low and high else None


# Rollout, rewards, trainer


def staleness(value: Any, nemo: Nemo) -> Any:
    """Steps that completions may be behind."""
    return value if nemo.get("grpo.async_grpo.enabled") else 0


in_flight = renamed({True: "in_flight", False: "between_batches"})
"""When weights are exchanged."""


def quantization(value: Any, nemo: Nemo) -> Any:
    """fp8 is quantized here, others are dtypes."""
    if value == "fp8":
        return Put("fp8_per_channel", "scales by channel; needs a rollout correction and tp 1")
    return "none"


def generated_batch(value: Any, nemo: Nemo) -> Any:
    """Prompts generated at once."""
    return value * (nemo.get("grpo.num_prompts_per_step") or 1)


def save_freq(value: Any, nemo: Nemo) -> Any:
    """Nothing is saved where checkpointing is off."""
    return value if nemo.get("checkpointing.enabled") else 0


def saves(value: Any, nemo: Nemo) -> Any:
    """After the last step too."""
    return bool(nemo.get("checkpointing.enabled"))


def keep_newest(value: Any, nemo: Nemo) -> Any:
    """NeMo-RL keeps the best."""
    return Put(value, "the newest; trainer.keep_best keeps the best by a validation metric too")


def wall_clock(value: Any, nemo: Nemo) -> Any:
    """DD:HH:MM:SS as seconds."""
    parts = str(value).split(":")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        return Drop("trainer.max_wall_clock_s, in seconds", to_set=True)
    days, hours, minutes, seconds = map(int, parts)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def trackers(value: Any, nemo: Nemo) -> Any:
    """A switch for each."""
    names = ("tensorboard", "wandb", "mlflow", "swanlab")
    return [name for name in names if nemo.get(f"logger.{name}_enabled")]


def turns(value: Any, nemo: Nemo) -> Any:
    """One turn needs no environment."""
    if value == 1:
        return Drop("one turn", same=True)
    return Put(value, "with environment.path or environment.tools (docs/environments.md)")
