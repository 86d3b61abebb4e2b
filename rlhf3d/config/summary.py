"""A run in a few lines of text, for the screen at its start and for the log."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf3d.batching.micro import UpdatePlan
from rlhf3d.config.derived import Derived
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.groups import WorkerGroup
from rlhf3d.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    RewardConfig,
    RolloutConfig,
    TrainerConfig,
)
from rlhf3d.units import counted


def summary_lines(config: Config, derived: Derived) -> list[str]:
    """The lines, each under a label of its own."""
    data, trainer = config.data, config.trainer
    bypass_mode = config.algorithm.rollout_correction.bypass_mode
    lines = [f"model      {config.model.path} in {config.model.dtype}"]
    lines += [f"layout     {_group_line(group)}" for group in derived.groups]
    lines += [
        f"rollout    {_rollout_line(config.rollout)}",
        f"step       {data.train_batch_size} prompts x {config.rollout.n} completions = "
        f"{derived.sequences_per_step} sequences of up to {data.max_prompt_length} + "
        f"{data.max_response_length} tokens",
        *_staleness_lines(config.rollout, bypass_mode, derived),
        f"actor      {_plan_line(derived.actor, config.actor.optim.lr)}",
    ]
    if derived.critic is not None:
        lines.append(f"critic     {_plan_line(derived.critic, config.critic.optim.lr)}")
    if config.environment.enabled:
        lines.append(f"turns      {_turns_line(config.environment)}")
    algorithm = [
        config.algorithm.adv_estimator,
        f"{config.actor.policy_loss} policy loss",
        config.actor.loss_agg_mode,
        *_algorithm_extras(config.algorithm, config.reward),
    ]
    validation = _validation_line(trainer) if data.val_files else "never (data.val_files is empty)"
    length = f"{counted(trainer.total_epochs, 'epoch')} of the data"
    if derived.total_steps is not None:
        length = f"{derived.total_steps} steps"
    return [
        *lines,
        f"algorithm  {', '.join(algorithm)}",
        f"validate   {validation}",
        f"run        {length}, seed {trainer.seed}, written to {trainer.output_dir}",
        *_warning_lines(config.actor),
    ]


def _rollout_line(rollout: RolloutConfig) -> str:
    dtype = rollout.dtype if rollout.quantization == "none" else rollout.quantization
    return (
        f"{counted(rollout.engines, 'engine')} x TP{rollout.tensor_parallel_size} in {dtype}, "
        f"temperature {rollout.temperature:g}"
    )


def _staleness_lines(rollout: RolloutConfig, bypass_mode: bool, derived: Derived) -> list[str]:
    """How far generation may be ahead of training, and what that means; nothing on-policy."""
    versions = derived.max_staleness
    if not versions:
        return []
    steps = derived.actor.optimizer_steps_per_step
    within = f", and within a batch up to {steps - 1} more" if steps > 1 else ""
    where = "between two batches"
    if rollout.update == "in_flight":
        where = "between two steps of an engine, while requests run"
    return [
        f"staleness  up to {versions} batch(es) ahead, new weights {where}: no token is more than "
        f"{counted(versions, 'version')} = {versions} x {steps} = "
        f"{counted(derived.stale_optimizer_steps, 'optimizer step')} old{within}",
        f"old_policy {_old_policy(bypass_mode)}",
        f"ahead      {_ahead_line(rollout, derived)}",
    ]


def _old_policy(bypass_mode: bool) -> str:
    if bypass_mode:
        return "the engine's log-probs: clipping is against the policy that sampled"
    return (
        "log-probs recomputed under the weights before the update; a rollout correction for the "
        "policy that sampled"
    )


def _ahead_line(rollout: RolloutConfig, derived: Derived) -> str:
    """What of a bound of k + 1 batches the engines hold at once."""
    if rollout.update == "between_batches":
        return (
            f"at most {derived.open_sequences} sequences not yet trained on; the engines have "
            f"{derived.sequences_per_step} of them at once, complete ones wait in the driver"
        )
    slots = rollout.engines * rollout.max_num_seqs
    waiting = ""
    if slots < derived.open_sequences:
        waiting = "; others wait in the engines' queues"
    return (
        f"at most {derived.open_sequences} sequences not yet trained on, all of them in the "
        f"engines at first, which decode {slots} at once (rollout.engines x "
        f"rollout.max_num_seqs){waiting}"
    )


def _turns_line(environment: EnvironmentConfig) -> str:
    what = environment.name or "that of each row"
    if environment.name is None and environment.tools:
        what = "tools alone where a row names none"
    tools = f", tools {', '.join(environment.tools)}" if environment.tools else ""
    together = ", in rounds" if environment.rounds else ""
    return (
        f"at most {environment.max_turns} with {environment.path} ({what}){tools}; "
        f"{environment.max_concurrent} environments at once{together}"
    )


def _validation_line(trainer: TrainerConfig) -> str:
    times = ["before the first step"] if trainer.val_before_train else []
    if trainer.test_freq > 0:
        times.append(f"every {trainer.test_freq} steps")
    return ", ".join([*times, "after the last"])


def _warning_lines(actor: ActorConfig) -> list[str]:
    """Settings that are valid together and are rarely meant."""
    if actor.policy_loss != "gspo" or actor.loss_agg_mode == "seq-mean-token-mean":
        return []
    return [
        f"warning    actor.policy_loss = gspo with actor.loss_agg_mode = {actor.loss_agg_mode}: "
        "long responses weigh more; GSPO's paper and verl use seq-mean-token-mean"
    ]


def _group_line(group: WorkerGroup) -> str:
    layout = group.layout_config
    switches = (
        "sequence_parallel",
        "distributed_optimizer",
        "overlap_grad_reduce",
        "overlap_param_gather",
    )
    extras = [name for name in switches if getattr(layout, name)]
    if layout.recompute != "none":
        extras.append(f"{layout.recompute} recompute")
    names = {"ref": "reference", "reward": f"reward model {group.model}"}
    roles = ", ".join(names.get(role, role) for role in group.roles)
    ranks = f"{group.layout} = {group.layout.world_size} ranks"
    return ", ".join([f"{group.name} group ({roles}): {ranks}", *extras])


def _algorithm_extras(algorithm: AlgorithmConfig, reward: RewardConfig) -> Iterator[str]:
    correction, weights = algorithm.rollout_correction, reward.weights
    if algorithm.filter_groups.enable:
        yield "dynamic sampling"
    if weights != {"accuracy": 1.0}:
        yield f"reward of {' and '.join(weights)}"
    if reward.overlong_buffer.enable:
        yield "overlong penalty"
    if correction.rollout_is is not None:
        yield f"importance weights by {correction.rollout_is}"
    if correction.rollout_rs is not None:
        yield f"rejection by {correction.rollout_rs}"
    if correction.bypass_mode:
        yield "the engine's log-probs as the old ones"


def _plan_line(plan: UpdatePlan, lr: float) -> str:
    rule = plan.micro_batching
    micro = f"micro-batches of at most {rule.tokens} tokens"
    if rule.tokens is None:
        micro = f"{plan.micro_batches_per_rank} micro-batches of {rule.rows}"
    packed = ", packed" if rule.packed else ""
    packed += ", prefixes once" if rule.share_prefixes else ""
    return (
        f"{counted(plan.epochs, 'epoch')} x {counted(plan.mini_batches, 'mini-batch')} of "
        f"{plan.sequences_per_mini_batch} sequences = "
        f"{counted(plan.optimizer_steps_per_step, 'optimizer step')}; "
        f"per rank: {micro}{packed}; lr {lr:g}"
    )
