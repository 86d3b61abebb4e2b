"""The numbers that follow from a `Config`.

Invariant: every count that the loop, the engines and the printed summary use is computed here,
once. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.config.groups import WorkerGroup, group_of, worker_groups
from rlhf3d.config.schema import ActorConfig, Config, LayoutConfig
from rlhf3d.parallel.layout import ParallelLayout

WIDTH_MULTIPLE = {"cuda": 128}
"""By platform: cuDNN builds its attention anew (0.1 to 0.4 s) for every number of rows and width,
and torch's allocator keeps blocks of every size; with few widths both stay few. Elsewhere any width
will do."""
COLUMN_BYTES_A_TOKEN = 48
"""Of a batch: a token id and ten columns in fp32."""


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
    """Completions a training step."""
    max_sequence_length: int
    """Longest prompt + completion, tokens; the engines' max_model_len."""
    actor: UpdatePlan
    """The policy's update."""
    critic: UpdatePlan | None
    """The critic's update; None where the estimator needs no values."""
    total_steps: int | None
    """Training steps of the run; None while the number of training rows is not known."""

    @property
    def batch_bytes(self) -> int:
        """A step's rows with all of their columns, padded."""
        return self.sequences_per_step * self.max_sequence_length * COLUMN_BYTES_A_TOKEN

    @property
    def layout(self) -> ParallelLayout:
        """Ranks of the actor."""
        return self.groups[0].layout


def derive(config: Config, train_rows: int | None = None) -> Derived:
    """The numbers of a checked configuration; `train_rows` (prompts an epoch) for a run in epochs.

    An epoch's last rows that do not fill a batch are not trained on; ValueError when not one batch
    fills.
    """
    groups = worker_groups(config)
    total = config.trainer.total_training_steps
    if total is None and train_rows is not None:
        total = config.trainer.total_epochs * (train_rows // config.data.train_batch_size)
    if total == 0:
        raise ValueError(
            f"data.train_files hold {train_rows} usable prompts, fewer than data.train_batch_size = "
            f"{config.data.train_batch_size}: lower it or add prompts"
        )
    engine_ranks = config.rollout.engines * config.rollout.tensor_parallel_size
    actor, *others = groups
    dedicated = sum(group.layout.world_size for group in others if not group.colocated)
    if config.rollout.placement == "disaggregated":
        dedicated += engine_ranks
    return Derived(
        groups=groups,
        world_size=sum(group.layout.world_size for group in groups),
        devices=actor.layout.world_size + dedicated,
        engine_ranks=engine_ranks,
        sequences_per_step=config.data.train_batch_size * config.rollout.n,
        max_sequence_length=config.data.max_prompt_length + config.data.max_response_length,
        actor=_update_plan(config, actor_batching(config), config.actor.layout),
        critic=_critic_plan(config) if config.needs_critic else None,
        total_steps=total,
    )


class Batching(NamedTuple):
    """One model's batch sizes as configured."""

    mini_batch_size: int
    """Prompts."""
    micro_batch_size: int
    """Sequences."""
    epochs: int
    max_tokens: int | None
    """Token budget of a micro-batch; None for micro-batches of so many sequences."""


def clip_range(actor: ActorConfig) -> tuple[float, float]:
    """How far the policy ratio may go below and above 1: `clip_ratio` where no bound is given."""
    low, high = actor.clip_ratio_low, actor.clip_ratio_high
    default = actor.clip_ratio
    return default if low is None else low, default if high is None else high


def actor_batching(config: Config) -> Batching:
    """Batch sizes of the actor, and of the reference."""
    actor = config.actor
    budget = actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None
    return Batching(
        actor.ppo_mini_batch_size, actor.ppo_micro_batch_size_per_gpu, actor.ppo_epochs, budget
    )


def critic_batching(config: Config) -> Batching:
    """Batch sizes of the critic: the actor's unless given."""
    sizes = "ppo_mini_batch_size ppo_micro_batch_size_per_gpu ppo_epochs use_dynamic_bsz ppo_max_token_len_per_gpu"
    given = {
        name: value for name in sizes.split() if (value := getattr(config.critic, name)) is not None
    }
    return actor_batching(replace(config, actor=replace(config.actor, **given)))


def micro_batching(config: Config, batching: Batching, layout: LayoutConfig) -> MicroBatching:
    """How a model with these batch sizes and this layout is cut into micro-batches."""
    return MicroBatching(
        rows=batching.micro_batch_size,
        tokens=batching.max_tokens,
        packed=config.model.use_remove_padding,
        **width_multiples(layout, config.cluster.platform),
    )


def width_multiples(layout: LayoutConfig, platform: str) -> dict[str, int]:
    """What the widths of micro-batches divide by: context-parallel ranks take two chunks of each
    sequence, tensor ranks a part of what those hold under sequence parallelism, kernels of the
    platform (cpu, cuda) few different ones.
    """
    chunks = 2 * layout.cp if layout.cp > 1 else 1
    shared = chunks * (layout.tp if layout.sequence_parallel else 1)
    return {
        "multiple_of": math.lcm(shared, WIDTH_MULTIPLE.get(platform, 1)),
        "row_multiple_of": chunks,
    }


def micro_batching_of(config: Config, role: str) -> MicroBatching:
    """How the passes of one model are cut into micro-batches."""
    reward = config.reward_model
    batching = {
        "critic": critic_batching(config),
        "reward": Batching(0, reward.micro_batch_size_per_gpu, 1, None),
    }.get(role, actor_batching(config))
    return micro_batching(config, batching, group_of(config, role).layout_config)


def _critic_plan(config: Config) -> UpdatePlan:
    return _update_plan(config, critic_batching(config), group_of(config, "critic").layout_config)


def _update_plan(config: Config, batching: Batching, layout: LayoutConfig) -> UpdatePlan:
    mini, micro, epochs, budget = batching
    sequences = mini * config.rollout.n
    per_rank = sequences // layout.dp
    mini_batches = config.data.train_batch_size // mini
    return UpdatePlan(
        mini_batch_size=mini,
        mini_batches=mini_batches,
        sequences_per_mini_batch=sequences,
        sequences_per_rank=per_rank,
        micro_batching=micro_batching(config, batching, layout),
        micro_batches_per_rank=per_rank // micro if budget is None else None,
        epochs=epochs,
        optimizer_steps_per_step=mini_batches * epochs,
    )


def summary_lines(config: Config, derived: Derived) -> list[str]:
    """The run in a few lines of plain text, for the screen at start and for the log."""
    rollout, data, trainer = config.rollout, config.data, config.trainer
    validation = [
        *["before the first step"] * trainer.val_before_train,
        *[f"every {trainer.test_freq} steps"] * (trainer.test_freq > 0),
        "after the last",
    ]
    run = (
        f"{derived.total_steps} steps"
        if derived.total_steps
        else f"{trainer.total_epochs} epoch(s) of the data"
    )
    lines = [
        f"model      {config.model.path} in {config.model.dtype}",
        *[f"layout     {_group_line(group)}" for group in derived.groups],
        f"rollout    {rollout.engines} engine(s) x TP{rollout.tensor_parallel_size} in "
        f"{rollout.dtype if rollout.quantization == 'none' else rollout.quantization}, "
        f"temperature {rollout.temperature:g}",
        f"step       {data.train_batch_size} prompts x {rollout.n} completions = "
        f"{derived.sequences_per_step} sequences of up to {data.max_prompt_length} + "
        f"{data.max_response_length} tokens",
        f"actor      {_plan_line(derived.actor, config.actor.optim.lr)}",
    ]
    if derived.critic is not None:
        lines.append(f"critic     {_plan_line(derived.critic, config.critic.optim.lr)}")
    return [
        *lines,
        f"algorithm  {config.algorithm.adv_estimator}, {config.actor.policy_loss} policy loss, "
        f"{config.actor.loss_agg_mode}{_algorithm_extras(config)}",
        f"validate   {', '.join(validation) if data.val_files else 'never (data.val_files is empty)'}",
        f"run        {run}, seed {trainer.seed}, written to {trainer.output_dir}",
        *_warning_lines(config),
    ]


def _warning_lines(config: Config) -> list[str]:
    """Settings that are valid together and are rarely meant."""
    if config.actor.policy_loss == "gspo" and config.actor.loss_agg_mode != "seq-mean-token-mean":
        return [
            f"warning    actor.policy_loss = gspo with actor.loss_agg_mode = {config.actor.loss_agg_mode}: long "
            "responses weigh more; GSPO's paper and verl use seq-mean-token-mean"
        ]
    return []


def _group_line(group: WorkerGroup) -> str:
    names = (
        "sequence_parallel",
        "distributed_optimizer",
        "overlap_grad_reduce",
        "overlap_param_gather",
    )
    extras = [name for name in names if getattr(group.layout_config, name)]
    if group.layout_config.recompute != "none":
        extras.append(f"{group.layout_config.recompute} recompute")
    names_of_roles = {"ref": "reference", "reward": f"reward model {group.model}"}
    roles = ", ".join(names_of_roles.get(role, role) for role in group.roles)
    ranks = f"{group.layout} = {group.layout.world_size} ranks"
    return f"{group.name} group ({roles}): {ranks}" + "".join(f", {name}" for name in extras)


def _algorithm_extras(config: Config) -> str:
    correction = config.algorithm.rollout_correction
    extras = {
        "dynamic sampling": config.algorithm.filter_groups.enable,
        f"reward of {' and '.join(config.reward.weights)}": dict(config.reward.weights)
        != {"accuracy": 1.0},
        "overlong penalty": config.reward.overlong_buffer.enable,
        f"importance weights by {correction.rollout_is}": correction.rollout_is is not None,
        f"rejection by {correction.rollout_rs}": correction.rollout_rs is not None,
        "the engine's log-probs as the old ones": correction.bypass_mode,
    }
    return "".join(f", {text}" for text, on in extras.items() if on)


def _plan_line(plan: UpdatePlan, lr: float) -> str:
    rule = plan.micro_batching
    if rule.tokens is None:
        micro = f"{plan.micro_batches_per_rank} micro-batches of {rule.rows}"
    else:
        micro = f"micro-batches of at most {rule.tokens} tokens"
    return (
        f"{plan.epochs} epoch(s) x {plan.mini_batches} mini-batch(es) of {plan.sequences_per_mini_batch} "
        f"sequences = {plan.optimizer_steps_per_step} optimizer step(s); a rank: "
        f"{micro}{', packed' if rule.packed else ''}; lr {lr:g}"
    )
