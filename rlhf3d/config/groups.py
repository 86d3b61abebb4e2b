"""The worker groups of a run: which models share processes, their layouts and devices.

Invariant: every model of a run is in exactly one group, and all models of a group have one layout.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rlhf3d.config.schema import Config, LayoutConfig, RolloutConfig
from rlhf3d.parallel.layout import ParallelLayout

TRAINABLE = ("actor", "critic")
"""Models that learn, and that a checkpoint keeps."""


@dataclass(frozen=True)
class WorkerGroup:
    """Processes that together hold some models, one rank each."""

    name: str
    """actor, critic or reward."""
    key: str
    """The configuration key of its layout."""
    roles: tuple[str, ...]
    """The models: actor, ref, critic, reward."""
    model: str
    """The HF folder that all of them start from."""
    layout_config: LayoutConfig
    colocated: bool = True
    """Whether its ranks are on the devices of the actor group's; on CPU every rank is a process
    with its own core."""

    @cached_property
    def layout(self) -> ParallelLayout:
        """The ranks."""
        return parallel_layout(self.layout_config)

    @property
    def size_text(self) -> str:
        """Its ranks as a product, for messages."""
        layout = self.layout
        context = f" x cp {layout.cp}" if layout.cp > 1 else ""
        sizes = f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp}{context}"
        return f"{self.key}: {sizes} = {layout.world_size} ranks"


def parallel_layout(config: LayoutConfig) -> ParallelLayout:
    """The grid of ranks that a section describes."""
    return ParallelLayout(
        tp=config.tp,
        pp=config.pp,
        dp=config.dp,
        vpp=config.vpp or 1,
        ep=config.ep,
        first_stage_layers=config.first_stage_layers,
        last_stage_layers=config.last_stage_layers,
        cp=config.cp,
    )


def worker_groups(config: Config) -> tuple[WorkerGroup, ...]:
    """The groups that a run places, the actor's first."""
    model, critic, reward = config.model.path, config.critic, config.reward_model
    roles = ["actor"]
    dedicated = []
    if config.needs_critic and critic.layout is None:
        # Without a layout of its own it is one more model in the actor's processes.
        roles.append("critic")
    elif config.needs_critic and critic.layout is not None:
        colocated = critic.placement == "colocated"
        dedicated.append(
            WorkerGroup("critic", "critic.layout", ("critic",), model, critic.layout, colocated)
        )
    if config.needs_reference:
        # Always with the actor: it has the actor's layout and weights to start from.
        roles.append("ref")
    if reward.path is not None:
        key, colocated = "reward_model.layout", reward.placement == "colocated"
        dedicated.append(
            WorkerGroup("reward", key, ("reward",), reward.path, reward.layout, colocated)
        )
    actor = WorkerGroup("actor", "actor.layout", tuple(roles), model, config.actor.layout)
    return (actor, *dedicated)


def group_of(groups: tuple[WorkerGroup, ...], role: str) -> WorkerGroup:
    """The group that holds a model of the run."""
    return next(group for group in groups if role in group.roles)


def device_terms(groups: tuple[WorkerGroup, ...], rollout: RolloutConfig) -> list[tuple[str, int]]:
    """Everything that has its own GPUs: how many as a product, for messages, and as a number."""
    actor, *others = groups
    # Colocated groups and engines share the actor's devices, which are counted once.
    dedicated = [actor, *(group for group in others if not group.colocated)]
    terms = [(group.size_text, group.layout.world_size) for group in dedicated]
    if rollout.placement == "disaggregated":
        ranks = rollout.engines * rollout.tensor_parallel_size
        text = (
            f"rollout.engines {rollout.engines} x rollout.tensor_parallel_size "
            f"{rollout.tensor_parallel_size} = {ranks} engine ranks"
        )
        terms.append((text, ranks))
    return terms
