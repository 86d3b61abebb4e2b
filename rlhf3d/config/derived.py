"""The numbers that follow from a `Config`.

Invariant: every count that the loop, the engines and the printed summary use is computed here,
once. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.config.groups import WorkerGroup, device_terms, group_of, worker_groups
from rlhf3d.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    CriticConfig,
    LayoutConfig,
    ModelConfig,
)
from rlhf3d.parallel.layout import ParallelLayout

WIDTH_MULTIPLE = {"cuda": 128}
"""By platform. cuDNN builds its attention again (0.1 to 0.4 s) for every number of rows and
width, and torch's allocator keeps blocks of every size: widths are rounded so that there are
few of them."""
SHARING_PLATFORMS = ("cpu",)
"""Platforms whose attention takes sequences that share their beginnings."""
# 8 (int64) + 10 x 4.
COLUMN_BYTES_PER_TOKEN = 48
"""Of a batch: a token id and ten columns in fp32."""

OldLogprobs = Literal["engine", "update", "phase"]
"""Where the log-probs of the policy before a step's update come from; see `old_logprobs_from`."""


@dataclass(frozen=True)
class Derived:
    """The numbers of a run that follow from its configuration."""

    groups: tuple[WorkerGroup, ...]
    """The worker groups, the actor's first."""
    world_size: int
    """Ranks of all worker groups."""
    devices: int
    """GPUs of the run, dedicated engines and groups included; on CPU, what would be its GPUs."""
    engine_ranks: int
    """vLLM ranks: engines x tensor_parallel_size."""
    sequences_per_step: int
    """Completions per training step."""
    max_sequence_length: int
    """Longest prompt + completion, tokens; the engines' max_model_len."""
    actor: UpdatePlan
    """The policy's update."""
    critic: UpdatePlan | None
    """The critic's update; None where the estimator needs no values."""
    total_steps: int | None
    """Training steps of the run; None while the number of training rows is not known."""
    max_staleness: int = 0
    """Versions of the weights that a token may be old when its batch is begun."""
    old_logprobs_from: OldLogprobs = "phase"
    """See `old_logprobs_from`."""

    @property
    def batch_bytes(self) -> int:
        """A step's rows with all of their columns, padded."""
        return self.sequences_per_step * self.max_sequence_length * COLUMN_BYTES_PER_TOKEN

    @property
    def open_sequences(self) -> int:
        """Completions that are asked for and not yet trained on, at most: what admission allows."""
        return (self.max_staleness + 1) * self.sequences_per_step

    @property
    def stale_optimizer_steps(self) -> int:
        """Optimizer steps that a token may be old at its batch's first one; at its last it is
        `actor.optimizer_steps_per_step` - 1 more.
        """
        return self.max_staleness * self.actor.optimizer_steps_per_step

    @property
    def layout(self) -> ParallelLayout:
        """Ranks of the actor."""
        return self.groups[0].layout


def derive(config: Config, train_rows: int | None = None) -> Derived:
    """The numbers of a checked configuration; `train_rows` (prompts per epoch) for a run in epochs.

    An epoch counts as many steps as its rows fill batches. ValueError where they fill none.
    """
    groups = worker_groups(config)
    total = config.trainer.total_training_steps
    if total is None and train_rows is not None:
        total = config.trainer.total_epochs * (train_rows // config.data.train_batch_size)
    if total == 0:
        raise ValueError(
            f"data.train_files hold {train_rows} usable prompts, fewer than "
            f"data.train_batch_size = {config.data.train_batch_size}: lower it or add prompts"
        )
    engine_ranks = config.rollout.engines * config.rollout.tensor_parallel_size
    prompts, n = config.data.train_batch_size, config.rollout.n
    updates = {"actor": actor_batching(config.actor)}
    if config.needs_critic:
        updates["critic"] = critic_batching(config.actor, config.critic)
    plans = {}
    for role, batching in updates.items():
        rule, dp = micro_batching_of(config, role), group_of(groups, role).layout.dp
        plans[role] = _update_plan(batching, rule, dp, prompts, n)
    return Derived(
        groups=groups,
        world_size=sum(group.layout.world_size for group in groups),
        devices=sum(count for _, count in device_terms(groups, config.rollout)),
        engine_ranks=engine_ranks,
        sequences_per_step=prompts * n,
        max_sequence_length=config.data.max_prompt_length + config.data.max_response_length,
        actor=plans["actor"],
        critic=plans.get("critic"),
        total_steps=total,
        max_staleness=config.rollout.max_staleness,
        old_logprobs_from=old_logprobs_from(
            config.algorithm,
            plans["actor"].optimizer_steps_per_step,
            config.trainer.critic_warmup,
        ),
    )


def old_logprobs_from(
    algorithm: AlgorithmConfig, optimizer_steps: int, critic_warmup: int
) -> OldLogprobs:
    """Where a run's old log-probs come from.

    engine: from the engines, which sampled (bypass mode). update: from the forward pass of the
    update itself, whose weights are the old ones as long as there is one optimizer step a batch.
    phase: from a forward pass of their own, where something needs them before the update or later
    optimizer steps compare with them.
    """
    correction = algorithm.rollout_correction
    if correction.bypass_mode:
        return "engine"
    # The KL in the reward enters the advantages, weights and rejections the loss. In a warm-up of
    # the critic there are steps without an update of the actor. No estimator reads old log-probs.
    needed_before = (
        algorithm.use_kl_in_reward
        or correction.rollout_is is not None
        or correction.rollout_rs is not None
        or critic_warmup > 0
    )
    return "phase" if needed_before or optimizer_steps > 1 else "update"


class Batching(NamedTuple):
    """One model's batch sizes as configured."""

    mini_batch_size: int
    """Prompts."""
    micro_batch_size: int
    """Sequences."""
    epochs: int
    max_tokens: int | None
    """Token budget of a micro-batch; None for micro-batches of a fixed number of sequences."""


def clip_range(actor: ActorConfig) -> tuple[float, float]:
    """How far the policy ratio may go below and above 1: `clip_ratio` where no bound is given."""
    low = actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low
    high = actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high
    return low, high


def actor_batching(actor: ActorConfig) -> Batching:
    """Batch sizes of the actor, and of the reference."""
    return Batching(
        actor.ppo_mini_batch_size,
        actor.ppo_micro_batch_size_per_gpu,
        actor.ppo_epochs,
        actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None,
    )


def critic_batching(actor: ActorConfig, critic: CriticConfig) -> Batching:
    """Batch sizes of the critic: the actor's, except where it has its own."""
    names = (
        "ppo_mini_batch_size",
        "ppo_micro_batch_size_per_gpu",
        "ppo_epochs",
        "use_dynamic_bsz",
        "ppo_max_token_len_per_gpu",
    )
    own = {name: getattr(critic, name) for name in names}
    given = {name: value for name, value in own.items() if value is not None}
    return actor_batching(replace(actor, **given))


def width_multiples(layout: LayoutConfig, platform: str) -> dict[str, int]:
    """By what the widths of micro-batches must divide, on a platform (cpu, cuda).

    Context-parallel ranks take two chunks of each sequence; with sequence parallelism
    tensor-parallel ranks take a part of those; and kernels should meet few different widths.
    """
    # Each rank takes one chunk from the front and one from the back: causal attention costs more
    # toward the end, so that pairs of chunks cost the same.
    chunks = 2 * layout.cp if layout.cp > 1 else 1
    shared = chunks * (layout.tp if layout.sequence_parallel else 1)
    return {
        "multiple_of": math.lcm(shared, WIDTH_MULTIPLE.get(platform, 1)),
        "row_multiple_of": chunks,
    }


def shares_prefixes(model: ModelConfig, layout: LayoutConfig, platform: str) -> bool:
    """Whether rows of a micro-batch have the tokens that they begin with once."""
    # `check_sizes` refuses true where auto is false.
    can = platform in SHARING_PLATFORMS and layout.cp == 1
    return model.share_prefixes is not False and can


def micro_batching_of(config: Config, role: str) -> MicroBatching:
    """How the passes of one model are cut into micro-batches."""
    if role == "critic":
        batching = critic_batching(config.actor, config.critic)
    elif role == "reward":
        # No mini-batches: it is never updated.
        batching = Batching(0, config.reward_model.micro_batch_size_per_gpu, 1, None)
    else:
        batching = actor_batching(config.actor)
    layout = group_of(worker_groups(config), role).layout_config
    return MicroBatching(
        rows=batching.micro_batch_size,
        tokens=batching.max_tokens,
        packed=config.model.use_remove_padding,
        share_prefixes=shares_prefixes(config.model, layout, config.cluster.platform),
        **width_multiples(layout, config.cluster.platform),
    )


def _update_plan(
    batching: Batching, rule: MicroBatching, dp: int, prompts: int, n: int
) -> UpdatePlan:
    """The plan of a model with `dp` replicas; a step has `prompts`, and of each `n` completions."""
    mini, micro, epochs, budget = batching
    sequences = mini * n
    return UpdatePlan(
        # All divisions are exact: `size_checks` refuses what does not divide.
        mini_batches=prompts // mini,
        sequences_per_mini_batch=sequences,
        micro_batching=rule,
        # By tokens their number differs from batch to batch.
        micro_batches_per_rank=sequences // dp // micro if budget is None else None,
        epochs=epochs,
    )
