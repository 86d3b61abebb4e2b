"""The sections of the models: layout, optimizer, policy, critic and reward model.

Invariant: as in `schema.py`, of which this is a part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rlhf3d.algorithms.names import AGGREGATION_MODES, KL_KINDS, POLICY_LOSSES
from rlhf3d.config.fields import (
    Count,
    CountOrZero,
    NotNegative,
    OneOf,
    Positive,
    UserPath,
    above,
    at_least,
    at_most,
    below,
)
from rlhf3d.parallel.layout import Recompute

Dtype = Literal["auto", "bfloat16", "float32"]
Placement = Literal["colocated", "disaggregated"]
AggregationMode = Annotated[str, OneOf(AGGREGATION_MODES)]
KLKind = Annotated[str, OneOf(KL_KINDS)]
Beta = Annotated[float, at_least(0), below(1)]


@dataclass(frozen=True)
class LayoutConfig:
    """How one model is cut over processes: tp x pp x dp x cp ranks."""

    tp: Count = 1
    """Tensor-parallel size: must divide attention heads and KV heads."""
    pp: Count = 1
    """Pipeline-parallel size: must divide the number of layers, unless first_stage_layers or
    last_stage_layers is set."""
    dp: Count = 1
    """Data-parallel size: replicas that each take a share of every mini-batch."""
    vpp: Count | None = None
    """Virtual pipeline stages per rank (interleaved 1F1B); null for plain 1F1B."""
    sequence_parallel: bool = False
    """Shard norms and dropout along the sequence over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduce-scatter with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gather of new weights with the next mini-batch's forward pass."""
    recompute: Recompute = "none"
    """What the backward pass computes again in each layer: nothing, its MLP or experts (selective),
    or all of it (full)."""
    ep: Count = 1
    """Expert-parallel size: ranks among which the experts are divided; must divide tp x cp x dp and
    the number of experts."""
    first_stage_layers: Count | None = None
    """Layers of the first pipeline stage; null for an equal share."""
    last_stage_layers: Count | None = None
    """Layers of the last pipeline stage; null for an equal share."""
    cp: Count = 1
    """Context-parallel size: ranks among which each sequence is divided, for sequences too long for
    one."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up schedule that advances once per training step."""

    lr: Positive = 1.0e-6
    """Peak learning rate."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""
    lr_warmup_steps: CountOrZero = 0
    """Training steps of linear warm-up from 0."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay on matrices."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's moment decay rates."""
    eps: Positive = 1.0e-8
    """Adam's denominator offset."""
    clip_grad: NotNegative = 1.0
    """Global gradient-norm clip; 0 turns clipping off."""


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained model that actor, critic and reference start from."""

    path: UserPath = ""
    """HF folder: config.json, safetensors (one file or sharded with an index), tokenizer."""
    chat_template: UserPath | None = None
    """A .jinja file in the place of the tokenizer's chat template, in training, validation and the
    exported folder; null for the tokenizer's own."""
    dtype: Dtype = "auto"
    """Compute dtype of the training ranks: bfloat16 (with fp32 master weights), float32, or auto
    (the platform's fastest)."""
    use_remove_padding: bool = False
    """Train on packed sequences instead of padded rows: same numbers, less work."""
    share_prefixes: bool | Literal["auto"] = "auto"
    """Compute tokens that rows of a micro-batch begin with once, such as the prompt of several
    completions: same numbers, less work. auto: on CPUs, without context parallelism."""
    offload: bool = False
    """Keep each model's weights, gradients and optimizer state in host memory while another model
    is in use."""


@dataclass(frozen=True)
class ActorConfig:
    """The policy and its update."""

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Layout of the training ranks; also of the reference, and of the critic unless critic.layout
    is set."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the policy."""
    ppo_mini_batch_size: Count = 64
    """Prompts (x rollout.n sequences) per optimizer step, over all data-parallel ranks."""
    ppo_micro_batch_size_per_gpu: Count = 4
    """Sequences per forward/backward pass on one data-parallel rank; never changes the
    mathematics."""
    use_dynamic_bsz: bool = False
    """Cut micro-batches by ppo_max_token_len_per_gpu instead of ppo_micro_batch_size_per_gpu."""
    ppo_max_token_len_per_gpu: Count = 16384
    """Tokens per forward/backward pass on one data-parallel rank, padding included; at least the
    longest sequence."""
    ppo_epochs: Count = 1
    """Passes over each batch."""
    policy_loss: Annotated[str, OneOf(POLICY_LOSSES, extensible=True)] = "vanilla"
    """Policy loss: vanilla is clipped PPO (docs/algorithms.md), or a name that
    algorithm.custom_path registers."""
    clip_ratio: Positive = 0.2
    """PPO clip range; default of clip_ratio_low and clip_ratio_high."""
    clip_ratio_low: Annotated[float, above(0), at_most(1)] | None = None
    """Lower clip range; null for clip_ratio."""
    clip_ratio_high: Positive | None = None
    """Upper clip range; null for clip_ratio."""
    clip_ratio_c: Annotated[float, above(1)] = 3.0
    """Dual-clip bound for negative advantages."""
    entropy_coeff: NotNegative = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add KL(policy, reference) to the loss (GRPO)."""
    kl_loss_coef: NotNegative = 0.001
    """Weight of that KL."""
    kl_loss_type: KLKind = "low_var_kl"
    """KL estimator; a + behind the name keeps its value and takes k2's gradient."""
    loss_agg_mode: AggregationMode = "token-mean"
    """How the losses of tokens are aggregated over the mini-batch."""


@dataclass(frozen=True)
class CriticConfig:
    """The value model and its update; placed only when the advantage estimator needs values."""

    layout: LayoutConfig | None = None
    """Layout of dedicated processes, with the keys of actor.layout; null: it shares the actor's
    processes."""
    placement: Placement = "colocated"
    """GPUs of dedicated processes: colocated on the actor's devices, or disaggregated on their
    own."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.0e-5))
    """Optimizer of the critic."""
    ppo_mini_batch_size: Count | None = None
    """As actor.ppo_mini_batch_size; null for the same."""
    ppo_micro_batch_size_per_gpu: Count | None = None
    """As actor.ppo_micro_batch_size_per_gpu; null for the same."""
    use_dynamic_bsz: bool | None = None
    """As actor.use_dynamic_bsz; null for the same."""
    ppo_max_token_len_per_gpu: Count | None = None
    """As actor.ppo_max_token_len_per_gpu; null for the same."""
    ppo_epochs: Count | None = None
    """As actor.ppo_epochs; null for the same."""
    cliprange_value: Positive = 0.5
    """Value clip range around the old values."""
    loss_agg_mode: AggregationMode = "token-mean"
    """Aggregation of the value loss."""


@dataclass(frozen=True)
class RewardModelConfig:
    """A sequence classifier that scores completions (reward.weights.reward_model)."""

    path: UserPath | None = None
    """HF folder of a classifier with one output (score.weight) and a tokenizer with chat template;
    null for none."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Layout of its processes."""
    placement: Placement = "colocated"
    """Its GPUs: colocated on the actor's devices, or disaggregated on its own."""
    micro_batch_size_per_gpu: Count = 8
    """Sequences per forward pass on one data-parallel rank."""
    max_length: Count | None = None
    """Longest input, prompt and completion in its own tokens; null for its window."""
    overlong: Literal["error", "truncate_left"] = "error"
    """What to do with a longer input: stop the run, or keep its last tokens (counted)."""
    mean: float = 0.0
    """Subtracted from the model's score; the part of the reward is (score - mean) / std."""
    std: Positive = 1.0
    """Divides the score after `mean` is subtracted."""
