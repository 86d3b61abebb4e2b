"""The processes of a run, started: Ray, training ranks, engine ranks.

Invariant: whoever leaves the `ExitStack` ends all of them, however far the start came.
Runs in: driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from ray.util.placement_group import PlacementGroup

from rlhf3d.config.derived import Derived, micro_batching_of
from rlhf3d.config.groups import WorkerGroup
from rlhf3d.config.schema import ClusterConfig, Config, RolloutConfig
from rlhf3d.experience.steps import Phase
from rlhf3d.parallel.platform import Platform
from rlhf3d.placement.cluster import cores_of, nodes_of, ray_cluster, reserve
from rlhf3d.placement.cluster_check import check_cluster
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.placement.resources import (
    Placement,
    engine_bundles,
    engine_threads,
    place,
    threads_of,
)
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.script import Script
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.worker import worker_setup
from rlhf3d.resharding.plan import ReshardPlan
from rlhf3d.resharding.setup import SyncSetup, sync_setup
from rlhf3d.rollout.api import Stops
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.trainer.inputs import RunInputs
from rlhf3d.trainer.preemption import PreemptionHandler


@dataclass(frozen=True)
class Processes:
    """What runs the models of a run."""

    groups: dict[str, TrainGroup]
    """By role (actor, ref, critic, reward): the training ranks that hold it.

    Only the roles that the run has; several roles may be in one group.
    """
    rollout: RolloutGroup
    sync: SyncSetup
    """The way of the weights from the actor's ranks to the engines'."""


def start_processes(
    stack: ExitStack,
    config: Config,
    derived: Derived,
    inputs: RunInputs,
    platform: Platform,
    preemption: PreemptionHandler,
    phase: Phase,
    journal: JournalWriter,
    script: Script | None,
) -> Processes:
    """Join Ray, reserve devices, check the nodes, start ranks and engines.

    `journal`: where it is written what engines do, and when; `script`: what they are to repeat.
    """
    placement = _placement(config.cluster, config.rollout, derived.groups, platform)
    devices = platform.pretended_devices(placement.gpus)
    # Ray installs a SIGTERM handler of its own: ours goes in again after it.
    stack.enter_context(
        ray_cluster(config.cluster, placement.cpus, preemption.handle, devices, derived.batch_bytes)
    )
    startup_timeout_s = config.cluster.startup_timeout_s
    reserved = stack.enter_context(reserve(placement, startup_timeout_s))
    # Before models load: a node without the run's files would only fail minutes later.
    check_cluster(config, reserved)
    with phase("start"):
        nodes, cores = nodes_of(reserved), cores_of(reserved, startup_timeout_s)
        reservation = _Reservation(config, platform, placement, reserved, nodes, cores)
        # Before the engines: which weights go where depends on the ranks' nodes, and decides where
        # the engines are.
        actor_nodes = reservation.nodes_of("actor")
        name = f"{os.getpid()}"  # of the files in shared memory, which tell whose they are
        sync = sync_setup(config.rollout, inputs.spec, derived.layout, platform, name, actor_nodes)
        engine_settings = EngineSettings(
            os.path.abspath(config.model.path),
            config.rollout,
            derived.max_sequence_length,
            platform,
            config.trainer.seed,
            Stops(inputs.ends.ids, config.rollout.stop),
            tokenizer=os.path.abspath(config.model.path),
        )
        assert derived.total_steps is not None
        start_groups = {
            group.name: partial(reservation.start_group, group, derived.total_steps)
            for group in derived.groups
        }
        start_engines = partial(
            reservation.start_engines, engine_settings, sync.plan, journal, script
        )
        rollout, groups = start_models(config.rollout, platform, start_engines, start_groups)
    return Processes(_by_role(derived.groups, groups), rollout, sync)


def _placement(
    cluster: ClusterConfig,
    rollout: RolloutConfig,
    groups: tuple[WorkerGroup, ...],
    platform: Platform,
) -> Placement:
    return place(
        platform,
        groups,
        rollout.engines,
        rollout.tensor_parallel_size,
        rollout.placement == "colocated",
        # A Ray that is started here has this node alone.
        1 if cluster.ray_address is None else cluster.num_nodes,
    )


@dataclass(frozen=True)
class _Reservation:
    """The devices of a run, and what is started on them."""

    config: Config
    platform: Platform
    placement: Placement
    reserved: PlacementGroup
    nodes: Sequence[int]
    """Number of the node that each bundle is on."""
    cores: Sequence[int]
    """Cores of each node."""

    def nodes_of(self, group: str) -> list[int]:
        """The node of each rank of a group."""
        return [self.nodes[bundle] for bundle in self.placement.groups[group]]

    def start_group(self, group: WorkerGroup, total_steps: int) -> TrainGroup:
        """Start the ranks of a worker group."""
        config = self.config
        nodes = self.nodes_of(group.name)
        return TrainGroup(
            worker_setup(config, group, self.platform, total_steps),
            config.cluster,
            self.placement,
            self.reserved,
            threads_of(nodes, self.cores, config.cluster.threads_per_rank),
            {role: micro_batching_of(config, role) for role in group.roles},
            config.data.max_response_length,
        )

    def start_engines(
        self,
        settings: EngineSettings,
        plan: ReshardPlan,
        journal: JournalWriter,
        script: Script | None,
    ) -> RolloutGroup:
        """Start the engine ranks on the devices that the plan of the sync is made for."""
        config = self.config
        bundles = engine_bundles(self.placement, plan)
        threads = engine_threads(bundles, self.nodes, self.cores, config.rollout.threads)
        output_dir = os.path.abspath(config.trainer.output_dir)
        return RolloutGroup(
            settings,
            config.cluster,
            self.placement,
            self.reserved,
            bundles,
            threads,
            output_dir,
            journal,
            script,
        )


def start_models(
    config: RolloutConfig,
    platform: Platform,
    start_engines: Callable[[], RolloutGroup],
    start_groups: Mapping[str, Callable[[], TrainGroup]],
) -> tuple[RolloutGroup, dict[str, TrainGroup]]:
    """Start engines and training ranks and wait for all of them.

    Engines that measure what is free of a device are alone on it until they have, and asleep, where
    they may sleep, before others load there.
    """
    alone = platform.measures_cache and config.placement == "colocated"
    rollout = start_engines()
    if alone:
        rollout.wait_ready()
        if config.sleep:
            rollout.sleep()
    groups = {name: start() for name, start in start_groups.items()}
    for group in groups.values():
        group.wait_ready()
    if not alone:  # all load at the same time, so the engines are waited for last
        rollout.wait_ready()
    return rollout, groups


def _by_role(
    groups: tuple[WorkerGroup, ...], started: Mapping[str, TrainGroup]
) -> dict[str, TrainGroup]:
    by_role: dict[str, TrainGroup] = {}
    for group in groups:
        by_role |= dict.fromkeys(group.roles, started[group.name])
    return by_role
