"""The worker groups of a run: which models share processes, how they are cut over them, and which
devices they take.

Invariant: every model of a run is in exactly one group, and all models of a group have one layout.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rlhf3d.config.schema import Config, LayoutConfig
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
        return f"{self.key}: tp {layout.tp} x pp {layout.pp} x dp {layout.dp}{context} = {layout.world_size} ranks"


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
    critic = config.critic
    apart = config.needs_critic and critic.layout is not None
    shared = ("critic",) if config.needs_critic and not apart else ()
    reference = ("ref",) if config.needs_reference else ()
    model, roles = config.model.path, ("actor", *shared, *reference)
    groups = [WorkerGroup("actor", "actor.layout", roles, model, config.actor.layout)]
    if apart and critic.layout is not None:
        colocated = critic.placement == "colocated"
        groups.append(
            WorkerGroup("critic", "critic.layout", ("critic",), model, critic.layout, colocated)
        )
    reward = config.reward_model
    if reward.path is not None:
        colocated = reward.placement == "colocated"
        groups.append(
            WorkerGroup(
                "reward", "reward_model.layout", ("reward",), reward.path, reward.layout, colocated
            )
        )
    return tuple(groups)


def group_of(config: Config, role: str) -> WorkerGroup:
    """The group that holds a model of the run."""
    return next(group for group in worker_groups(config) if role in group.roles)


def device_terms(config: Config) -> list[tuple[str, int]]:
    """What takes devices of its own on GPUs: the product that says how many, and how many."""
    groups = worker_groups(config)
    terms = [
        (g.size_text, g.layout.world_size) for g in groups if g is groups[0] or not g.colocated
    ]
    rollout = config.rollout
    ranks = rollout.engines * rollout.tensor_parallel_size
    text = (
        f"rollout.engines {rollout.engines} x rollout.tensor_parallel_size {rollout.tensor_parallel_size} = {ranks} "
        "engine ranks"
    )
    return [*terms, *[(text, ranks)] * (rollout.placement != "colocated")]
