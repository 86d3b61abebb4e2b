"""Whether this machine can run a configuration: what is needed against what was found.

Invariant: only reads, and lists every shortage at once. Memory is the plan's (`rlhf3d.planning`):
on GPUs its peak, with the longest sequences there can be; on a host that CPU ranks share, what they
hold all the time, so that passing there is necessary and not sufficient.
Runs in: driver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from rlhf3d.config.checks import check
from rlhf3d.config.derived import Derived, derive
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import ClusterConfig, Config, RolloutConfig
from rlhf3d.inputs import check_files
from rlhf3d.machine import Machine, read_machine
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.planning.checkpoint import checkpoint_bytes
from rlhf3d.planning.hardware import Cluster, load_hardware
from rlhf3d.planning.measured import default_problem, with_measured
from rlhf3d.planning.plan import DEFAULT_CPU, DEFAULT_GPU, Plan, find_spec, make_plan
from rlhf3d.units import GIB, MIB, counted

SHARED_MEMORY_GIB = 0.5
"""Ray's object store (256 MiB) and the rings of gloo, NCCL and vLLM for a small run."""
CUDA_SHARED_MEMORY_GIB = 1.0
"""Shared memory of each CUDA process on a host, for NCCL and vLLM (rule of thumb)."""


def preflight(config: Config, show: Callable[[Plan], None] | None = None) -> list[str]:
    """Return every reason why `config` cannot run here, with what is needed and what was found.

    `show` is given the plan where memory is short, or tight: the latter is no reason against a run.
    """
    machine = read_machine(config.trainer.output_dir)
    platform = config.cluster.platform
    cuda = platform == "cuda" or (platform == "auto" and bool(machine.gpus))
    known = set(check(config))
    # From here on no value is `auto`: files, plan and memory are those of this platform.
    kind = CUDAPlatform if cuda else CPUPlatform
    config = resolve_platform(config, kind(reason="preflight"))
    # Only what is wrong with what `auto` became; the rest was reported when it was read. By the
    # text of each problem: a second check repeats those that were reported.
    problems = [problem for problem in check(config) if problem not in known]
    problems += check_files(config)
    if cuda:
        problems += default_problem()
    plan = None
    with suppress(ValueError):  # of a model that no plan can be made for: `check_files` reports it
        spec, _ = find_spec(config.model.path)
        plan = make_plan(config, spec, _cluster_of(machine, config.cluster, cuda))
    memory: list[str] = []
    # The nodes of a remote cluster cannot be read from here; `check_cluster` does it there.
    if config.cluster.ray_address is None or not cuda:
        derived, rollout = derive(config), config.rollout
        problems += _devices(config.cluster, derived, machine) if cuda else _kernels(rollout)
        if plan is not None:
            memory = _gpu_memory(plan, machine) if cuda else _cpu_memory(plan, derived, machine)
        nodes = config.cluster.num_nodes
        problems += [*memory, *_shared_memory(rollout, nodes, derived, machine, cuda)]
    if plan is None:
        return problems
    if show is not None and (memory or (cuda and plan.verdict == "tight")):
        show(plan)
    return [*problems, *_disk(plan, machine)]


def _cluster_of(machine: Machine, wanted: ClusterConfig, cuda: bool) -> Cluster:
    """Nodes with the GPUs and the memory of this machine."""
    gpu = None
    if machine.gpus:
        # Ranks hold about the same: the GPU with the least memory decides.
        gpu = (machine.gpus[0][0], min(memory for _, memory in machine.gpus))
    # On CPU host memory is the device's: the plan takes all of it, `_cpu_memory` what is free.
    host_gib = machine.memory_available_gib if cuda else machine.memory_gib
    return cluster_here(wanted, cuda, gpu, host_gib)


def cluster_here(
    wanted: ClusterConfig,
    cuda: bool,
    gpu: tuple[str, float] | None = None,
    host_gib: float | None = None,
) -> Cluster:
    """Return nodes like this one to plan for, with what was measured here.

    `gpu` is the name and the memory, GiB, of each GPU; `host_gib` the memory of the host.
    """
    known = load_hardware()
    hardware = known[DEFAULT_GPU if cuda else DEFAULT_CPU]
    # A CPU machine counts as one device, which all ranks share.
    cluster = Cluster(hardware, 1, 1)
    if cuda:
        if gpu is not None:
            # A device of which nobody knows the numbers gets those of the default.
            unknown = replace(hardware, name=gpu[0])
            named = (entry for entry in known.values() if entry.is_device(gpu[0]))
            hardware = next(named, unknown)
        per_node = wanted.gpus_per_node
        cluster = Cluster(hardware, wanted.num_nodes * per_node, per_node)
        cluster = with_measured(cluster, None)
        if gpu is not None:
            cluster = replace(cluster, hardware=replace(cluster.hardware, memory_gib=gpu[1]))
    if host_gib is not None:
        cluster = replace(cluster, hardware=replace(cluster.hardware, host_memory_gib=host_gib))
    return cluster


def _devices(cluster: ClusterConfig, derived: Derived, machine: Machine) -> list[str]:
    wanted = _local_devices(derived, cluster.num_nodes)
    if len(machine.gpus) >= wanted:
        return []
    groups = ", ".join(f"{group.name} group {group.layout}" for group in derived.groups)
    return [
        f"cluster.platform = {cluster.platform}: needs {wanted} GPUs on each of "
        f"{counted(cluster.num_nodes, 'node')} for {groups} and "
        f"{counted(derived.engine_ranks, 'engine rank')}, found {len(machine.gpus)}; "
        "run it where they are, or use a smaller layout"
    ]


def _local_devices(derived: Derived, nodes: int) -> int:
    """GPUs of a node."""
    # Colocated engines may take more GPUs than the ranks that train.
    return math.ceil(max(derived.devices, derived.engine_ranks) / nodes)


def _kernels(rollout: RolloutConfig) -> list[str]:
    if not rollout.expert_parallel or rollout.tensor_parallel_size == 1:
        return []
    return [
        "rollout.expert_parallel with rollout.tensor_parallel_size = "
        f"{rollout.tensor_parallel_size}: vLLM's CPU kernel ignores which experts a rank has, and "
        "crashes; set it to false on CPU"
    ]


def _gpu_memory(plan: Plan, machine: Machine) -> list[str]:
    """The plan's peak against each GPU and a node's host memory; without GPUs only the latter."""
    if machine.gpus:
        return list(plan.memory.problems)
    return _host_memory(machine, plan.memory.host.terms)


def _cpu_memory(plan: Plan, derived: Derived, machine: Machine) -> list[str]:
    """What ranks and engines hold all the time, and the engines' room for keys and values."""
    terms = {f"{group.name} group": 0 for group in derived.groups}
    for rank in plan.memory.ranks:
        for group in derived.groups:
            if rank.place.startswith(group.name):
                terms[f"{group.name} group"] += len(rank.ranks) * sum(rank.resident.values())
    for name in ("engines", "environments", "offloaded states"):
        if name in plan.memory.host.terms:
            terms[name] = plan.memory.host.terms[name]
    cluster = plan.job.config.cluster
    # Without a cluster that is named, CPU ranks all run here, whatever num_nodes says.
    hosts = 1 if cluster.ray_address is None else cluster.num_nodes
    # The plan's other problems are about peaks; here only what is held all the time counts.
    problems = [problem for problem in plan.memory.problems if problem.startswith("vLLM")]
    return problems + _host_memory(machine, terms, hosts)


def _host_memory(machine: Machine, terms: Mapping[str, int], hosts: int = 1) -> list[str]:
    """`terms`, bytes, are shared by `hosts` equally."""
    needed_gib = sum(terms.values()) / hosts / GIB
    if needed_gib <= machine.memory_available_gib:
        return []
    parts = ", ".join(f"{name} {size / hosts / GIB:.1f}" for name, size in terms.items())
    return [
        f"host memory: needs about {needed_gib:.1f} GiB ({parts}), found "
        f"{machine.memory_available_gib:.1f} GiB available of {machine.memory_gib:.1f}; "
        "close other programs, or use a smaller model or fewer ranks"
    ]


def _shared_memory(
    rollout: RolloutConfig, nodes: int, derived: Derived, machine: Machine, cuda: bool
) -> Iterator[str]:
    """Ray, NCCL and vLLM, batches on their way through Ray's object store, and weight syncs.

    Each reader of a sync has two buckets: that of an export, on CPU also each rank of an engine.
    """
    platform = CUDAPlatform if cuda else CPUPlatform
    # On GPUs engines read weights from GPU memory; only an export reads through /dev/shm.
    readers = 1 if cuda else rollout.tensor_parallel_size + 1
    bucket_mib = rollout.sync_bucket_mib or platform.sync_bucket_mib
    needed_gib = SHARED_MEMORY_GIB
    if cuda:
        needed_gib = _local_devices(derived, nodes) * CUDA_SHARED_MEMORY_GIB
    needed_gib += 2 * (readers * bucket_mib * MIB + derived.batch_bytes) / GIB
    if needed_gib > machine.shared_memory_gib:
        yield (
            f"/dev/shm: needs about {needed_gib:.1f} GiB, "
            f"found {machine.shared_memory_gib:.1f} GiB free; "
            f"in a container start it with --shm-size={math.ceil(needed_gib)}g"
        )


def checkpoints_gib(plan: Plan) -> float:
    """Return the room for checkpoints: for one, and for a second while it replaces the first."""
    return _checkpoints(plan) * checkpoint_bytes(plan.job) / GIB


def _checkpoints(plan: Plan) -> int:
    trainer = plan.job.config.trainer
    return 2 if trainer.save_freq else int(trainer.save_at_end)


def _disk(plan: Plan, machine: Machine) -> Iterator[str]:
    needed_gib, count = checkpoints_gib(plan), _checkpoints(plan)
    if needed_gib > machine.disk_gib:
        yield (
            f"disk: {counted(count, 'checkpoint')} of {needed_gib / count:.1f} GiB at "
            f"trainer.output_dir = {plan.job.config.trainer.output_dir}, found "
            f"{machine.disk_gib:.1f} GiB free; write elsewhere"
        )
