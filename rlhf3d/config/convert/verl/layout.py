"""From verl's layouts to ours, one function for each difference.

Invariant: as in `changes.py`, of which this is a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf3d.config.convert.rules import Change, Drop, Put, only_if, same
from rlhf3d.config.convert.verl.read import Verl

A, R, M = (f"actor_rollout_ref.{part}." for part in ("actor", "rollout", "model"))
MEGATRON_SIZES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
}
"""verl's names of the sizes of Megatron's layout, and ours."""
REWARD = ("reward.reward_model.", "reward_model.")
"""Where a reward model is: now, and before."""
REWARD_RANKS = (
    "reward.reward_model.rollout.tensor_model_parallel_size",
    "reward_model.inference.tensor_model_parallel_size",
)
"""GPUs of a reward model that is served."""


def context_parallel(verl: Verl) -> int:
    """Ranks among which a sequence is divided: Megatron's, or Ulysses'."""
    megatron = A + "megatron.context_parallel_size"
    ulysses = (
        A + "ulysses_sequence_parallel_size",
        A + "fsdp_config.ulysses_sequence_parallel_size",
    )
    found = verl.get(megatron) if verl.is_megatron else verl.get(*ulysses)
    return int(found or 1)


def cp(value: Any, verl: Verl) -> Any:
    """Ulysses' ranks are context-parallel ones here."""
    size = context_parallel(verl)
    if verl.is_megatron or size == 1:
        return size
    return Put(size, "Ulysses divides heads, context parallelism the sequence: same numbers")


def world(verl: Verl) -> int:
    """GPUs that verl's workers share."""
    return int(verl.get("trainer.nnodes") or 1) * int(verl.get("trainer.n_gpus_per_node") or 8)


megatron_size = only_if(lambda verl: verl.is_megatron, "verl's FSDP workers do not read it")
"""A size of Megatron's layout; FSDP has none."""


def data_parallel(value: Any, verl: Verl) -> Any:
    """What is left of the GPUs."""
    size = context_parallel(verl)
    if verl.is_megatron:
        return _left(world(verl), _sizes(A, verl))
    return Put(
        max(world(verl) // size, 1),
        "FSDP shards weights over the replicas, this package over tp and pp: `rlhf3d plan CONFIG "
        "--search` finds those that fit",
    )


def sequence_parallel(value: Any, verl: Verl) -> Any:
    """On by default in verl's Megatron, and without effect at tp 1."""
    tp = int(verl.get(A + "megatron.tensor_model_parallel_size") or 1)
    return bool(verl.is_megatron and tp > 1 and value is not False)


def recompute(value: Any, verl: Verl) -> Any:
    """FSDP recomputes whole layers, Megatron what its granularity says."""
    if not verl.is_megatron:
        return "none" if verl.get(M + "enable_gradient_checkpointing") is False else "full"
    granularity = verl.get(
        A + "megatron.override_transformer_config.recompute_granularity",
        M + "gradient_checkpointing_kwargs.activations_checkpoint_granularity",
    )
    if granularity == "selective":
        return Put("selective", "here it is the MLP or the experts of a layer")
    return granularity or "none"


def of_the_actor(name: str) -> Change:
    """The reference has the actor's layout."""

    def change(value: Any, verl: Verl) -> Drop:
        if value == verl.get(A + name):
            return Drop("the reference has the actor's layout", same=True)
        return Drop("the reference has the actor's layout; the numbers are the same")

    return change


def _sizes(prefix: str, verl: Verl) -> dict[str, Any]:
    """The sizes of a layout of Megatron's, verl's defaults included."""
    return {
        ours: verl.get(f"{prefix}megatron.{size}") or 1 for size, ours in MEGATRON_SIZES.items()
    }


def has_own_critic(verl: Verl) -> bool:
    """Whether there is a critic whose layout is not the actor's."""
    needed = (verl.get("algorithm.adv_estimator") or "gae") == "gae"
    given = any(name.startswith("critic.megatron.") for name in verl.values)
    differs = _sizes("critic.", verl) != _sizes(A, verl)
    return needed and given and differs and verl.is_megatron


def of_the_critic(change: Change = same) -> Change:
    """Keys of critic.layout, which stands where the critic is not in the actor's processes."""
    otherwise = "without sizes of its own, the critic is in the actor's processes"
    return only_if(has_own_critic, otherwise, change)


def critic_data_parallel(value: Any, verl: Verl) -> Any:
    """What is left of the GPUs."""
    return _left(world(verl), _sizes("critic.", verl))


def critic_sequence_parallel(value: Any, verl: Verl) -> Any:
    """As the actor's."""
    tp = _sizes("critic.", verl)["tp"]
    return bool(tp > 1 and verl.get("critic.megatron.sequence_parallel") is not False)


def reward_ranks(value: Any, verl: Verl) -> Any:
    """A reward model of Megatron's, or one that is served."""
    if verl.get(*REWARD_RANKS) is None:
        return value
    return Put(value, "Megatron's here; verl serves the model")


def reward_data_parallel(value: Any, verl: Verl) -> Any:
    """What is left of the GPUs, or of those that are set aside for the reward model."""
    gpus = world(verl)
    if _of_reward("enable_resource_pool", verl):
        gpus = (_of_reward("nnodes", verl) or 1) * (_of_reward("n_gpus_per_node", verl) or 8)
    sizes = _sizes("reward_model.", verl)
    return _left(gpus, sizes | {"tp": verl.get(*REWARD_RANKS) or sizes["tp"]})


def _of_reward(name: str, verl: Verl) -> Any:
    return verl.get(*(f"{prefix}{name}" for prefix in REWARD))


def _left(gpus: int, sizes: Mapping[str, int]) -> int:
    return max(gpus // (sizes["tp"] * sizes["pp"] * sizes["cp"]), 1)


def engines(value: Any, verl: Verl) -> Any:
    """verl's replicas: what is left of the GPUs, or the rollout's own nodes."""
    ranks = int(verl.get(R + "tensor_model_parallel_size") or 2)
    gpus = own_nodes(verl) * int(verl.get(R + "n_gpus_per_node") or 8)
    return max((gpus or world(verl)) // ranks, 1)


def own_nodes(verl: Verl) -> int:
    """Nodes that only generate."""
    return int(verl.get(R + "nnodes") or 0)


def placement(value: Any, verl: Verl) -> Any:
    """Engines with nodes of their own."""
    return "disaggregated" if own_nodes(verl) else "colocated"


def all_nodes(value: Any, verl: Verl) -> Any:
    """Those that train, and those that only generate."""
    return int(verl.get("trainer.nnodes") or 1) + own_nodes(verl)


def any_offload(value: Any, verl: Verl) -> Any:
    """One switch for weights, gradients and optimizer of all models."""
    parts = ("param_offload", "optimizer_offload", "grad_offload")
    names = [A + "fsdp_config." + part for part in parts]
    names += [A + "megatron." + part for part in parts]
    if not any(verl.get(name) for name in names):
        return False
    return Put(True, "one switch for all models: weights, gradients and optimizer state")
