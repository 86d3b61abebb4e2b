"""The processes of a run, started: Ray, training ranks, engine ranks.

Invariant: whoever leaves the `ExitStack` ends all of them, however far the start came.
Runs in: driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from rlhf3d.config.derived import Derived, micro_batching_of
from rlhf3d.config.groups import WorkerGroup
from rlhf3d.config.schema import Config, RolloutConfig
from rlhf3d.experience.collect import Phase
from rlhf3d.parallel.platform import Platform
from rlhf3d.placement.cluster import cores_of, nodes_of, ray_cluster, reserve
from rlhf3d.placement.cluster_check import check_cluster
from rlhf3d.placement.resources import engine_bundles, engine_threads, place, threads_of
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.worker import worker_setup
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
) -> Processes:
    """Join Ray, reserve devices, check the nodes, start ranks and engines."""
    cluster, engines = config.cluster, config.rollout
    placement = place(
        platform,
        derived.groups,
        engines.engines,
        engines.tensor_parallel_size,
        engines.placement == "colocated",
        1 if cluster.ray_address is None else cluster.num_nodes,
    )
    devices = platform.pretended_devices(placement.gpus)
    # Ray installs a SIGTERM handler of its own: ours goes in again after it.
    stack.enter_context(
        ray_cluster(cluster, placement.cpus, preemption.handle, devices, derived.batch_bytes)
    )
    reserved = stack.enter_context(reserve(placement, cluster.startup_timeout_s))
    check_cluster(config, reserved)  # before anything loads that would find out the slow way
    with phase("start"):
        # The ranks' nodes decide which weights go where, and so where each engine is placed best.
        nodes, cores = nodes_of(reserved), cores_of(reserved, cluster.startup_timeout_s)
        places = {
            name: [nodes[bundle] for bundle in ranks] for name, ranks in placement.groups.items()
        }
        sync = sync_setup(
            engines, inputs.spec, derived.layout, platform, f"{os.getpid()}", places["actor"]
        )
        bundles = engine_bundles(placement, sync.plan)
        engine_settings = EngineSettings(
            os.path.abspath(config.model.path),
            engines,
            derived.max_sequence_length,
            platform,
            config.trainer.seed,
            Stops(inputs.ends.ids, engines.stop),
        )
        steps = derived.total_steps
        assert steps is not None

        def start_group(group: WorkerGroup) -> TrainGroup:
            threads = threads_of(places[group.name], cores, cluster.threads_per_rank)
            return TrainGroup(
                worker_setup(config, group, platform, steps),
                cluster,
                placement,
                reserved,
                threads,
                {role: micro_batching_of(config, role) for role in group.roles},
                config.data.max_response_length,
            )

        def start_engines() -> RolloutGroup:
            threads = engine_threads(bundles, nodes, cores, engines.threads)
            folder = os.path.abspath(config.trainer.output_dir)
            return RolloutGroup(
                engine_settings, cluster, placement, reserved, bundles, threads, folder
            )

        start_groups = {group.name: partial(start_group, group) for group in derived.groups}
        rollout, groups = start_models(engines, platform, start_engines, start_groups)
    return Processes(_by_role(derived.groups, groups), rollout, sync)


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
