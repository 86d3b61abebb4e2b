"""Whether this machine can run a configuration: what is needed beside what was found.

Invariant: only reads, and lists every shortage at once. Memory is the plan's (`rlhf3d.planning`): on GPUs its peak,
with the longest sequences there can be; on a host that CPU ranks share what they hold all the time, so that passing
there is necessary and not sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from rlhf3d.config.checks import check
from rlhf3d.config.derived import Derived, derive
from rlhf3d.config.groups import device_terms
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config
from rlhf3d.inputs import check_files
from rlhf3d.machine import Machine, read_machine
from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.planning.hardware import Cluster, load_hardware
from rlhf3d.planning.measured import default_problem, with_measured
from rlhf3d.planning.memory import checkpoint_bytes
from rlhf3d.planning.plan import DEFAULT_CPU, DEFAULT_GPU, Plan, find_spec, make_plan
from rlhf3d.units import GIB

SHARED_MEMORY_GIB = 0.5
"""Ray's object store (256 MiB) and the rings of gloo, NCCL and vLLM for a small run."""
CUDA_SHARED_MEMORY_GIB = 1.0
"""Shared memory of each CUDA process on a host, for NCCL and vLLM (rule of thumb)."""


def preflight(config: Config, show: Callable[[Plan], None] | None = None) -> list[str]:
    """Every reason why `config` cannot run here, each with what is needed and what was found.

    `show` is given the plan where memory is short, or tight: that is no reason against it.
    """
    machine = read_machine(config.trainer.output_dir)
    cuda = config.cluster.platform == "cuda" or (
        config.cluster.platform == "auto" and bool(machine.gpus)
    )
    platform = CUDAPlatform(reason="preflight") if cuda else CPUPlatform(reason="preflight")
    known, config = set(check(config)), resolve_platform(config, platform)
    problems = [
        problem for problem in check(config) if problem not in known
    ]  # of the platform that `auto` became
    derived = derive(config)
    problems += check_files(config) + (default_problem() if cuda else [])
    try:
        gpu = (
            (machine.gpus[0][0], min(memory for _, memory in machine.gpus))
            if machine.gpus
            else None
        )
        plan = plan_here(
            config,
            find_spec(config)[0],
            cuda,
            gpu,
            machine.memory_available_gib if cuda else machine.memory_gib,
        )
    except (
        ValueError
    ):  # reported by check_files; what does not depend on the model is still compared
        plan = None
    short: list[str] = []
    if (
        config.cluster.ray_address is None or not cuda
    ):  # a remote cluster's nodes cannot be read from here
        problems += _compare_devices(config, derived, machine) if cuda else _compare_kernels(config)
        if plan is not None:
            short = _compare_gpus(plan, machine) if cuda else _compare_host(plan, derived, machine)
        problems += short + _compare_shared_memory(config, derived, machine, cuda)
    if show is not None and plan is not None and (short or (cuda and plan.verdict == "tight")):
        show(plan)
    return problems + (_compare_disk(plan, machine) if plan is not None else [])


def plan_here(
    config: Config,
    spec: ModelSpec,
    cuda: bool,
    gpu: tuple[str, float] | None = None,
    host_gib: float | None = None,
) -> Plan:
    """The plan on nodes like this one: with GPUs of that name and memory, GiB, or sharing `host_gib` of memory.

    With what was measured here (`rlhf3d.planning.measured`). Raises ValueError where model and layout do not fit each
    other.
    """
    known = load_hardware()
    hardware = known[DEFAULT_GPU if cuda else DEFAULT_CPU]
    if (
        cuda and gpu is not None
    ):  # of a device that nobody knows the numbers of the default are taken
        unknown = replace(hardware, name=gpu[0])
        hardware = next((entry for entry in known.values() if entry.is_device(gpu[0])), unknown)
    nodes, per_node = (config.cluster.num_nodes, config.cluster.gpus_per_node) if cuda else (1, 1)
    cluster = Cluster(hardware, nodes * per_node, per_node)
    if cuda:
        cluster = with_measured(cluster, None)
    if cuda and gpu is not None:
        cluster = replace(cluster, hardware=replace(cluster.hardware, memory_gib=gpu[1]))
    if host_gib is not None:
        cluster = replace(cluster, hardware=replace(cluster.hardware, host_memory_gib=host_gib))
    return make_plan(config, spec, cluster)


def _compare_devices(config: Config, derived: Derived, machine: Machine) -> list[str]:
    nodes, local = config.cluster.num_nodes, _local_devices(config, derived)
    if len(machine.gpus) >= local:
        return []
    groups = ", ".join(f"{group.name} group {group.layout}" for group in derived.groups)
    return [
        f"cluster.platform = {config.cluster.platform}: needs {local} GPUs on each of {nodes} node(s) "
        f"for {groups} and {derived.engine_ranks} engine rank(s), found {len(machine.gpus)}; "
        "run it where they are, or use a smaller layout"
    ]


def _local_devices(config: Config, derived: Derived) -> int:
    """GPUs of a node."""
    taken = sum(count for _, count in device_terms(config))
    return math.ceil(max(taken, derived.engine_ranks) / config.cluster.num_nodes)


def _compare_gpus(plan: Plan, machine: Machine) -> list[str]:
    """The plan's peak against each GPU, and a node's host memory; without GPUs only the latter."""
    if machine.gpus:
        return list(plan.memory.problems)
    host = plan.memory.host
    return _compare_memory(machine, {name: size / GIB for name, size in host.terms.items()})


def _compare_host(plan: Plan, derived: Derived, machine: Machine) -> list[str]:
    """What ranks and engines on CPU hold all the time, a host's equal share of it, and the engines' room for keys and
    values."""
    parts = {
        f"{group.name} group": sum(
            len(rank.ranks) * sum(rank.resident.values())
            for rank in plan.memory.ranks
            if rank.place.startswith(group.name)
        )
        for group in derived.groups
    }
    parts |= {
        name: size
        for name, size in plan.memory.host.terms.items()
        if name in ("engines", "offloaded states")
    }
    cluster = plan.job.config.cluster
    hosts = 1 if cluster.ray_address is None else cluster.num_nodes
    problems = [problem for problem in plan.memory.problems if problem.startswith("vLLM")]
    return problems + _compare_memory(
        machine, {name: size / hosts / GIB for name, size in parts.items()}
    )


def _compare_kernels(config: Config) -> list[str]:
    rollout = config.rollout
    if not rollout.expert_parallel or rollout.tensor_parallel_size == 1:
        return []
    return [
        f"rollout.expert_parallel with rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: "
        "vLLM's CPU kernel ignores which experts a rank has, and crashes; set it to false on CPU"
    ]


def _compare_memory(machine: Machine, parts_gib: dict[str, float]) -> list[str]:
    needed_gib = sum(parts_gib.values())
    if needed_gib <= machine.memory_available_gib:
        return []
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in parts_gib.items())
    return [
        f"host memory: needs about {needed_gib:.1f} GiB ({parts}), found {machine.memory_available_gib:.1f} GiB "
        f"available of {machine.memory_gib:.1f}; close other programs, or use a smaller model or fewer ranks"
    ]


def _compare_shared_memory(
    config: Config, derived: Derived, machine: Machine, cuda: bool
) -> list[str]:
    """Ray, NCCL and vLLM; and two buckets for the reader of an export, on CPU for each rank of an engine too."""
    platform, readers = (
        (CUDAPlatform, 1) if cuda else (CPUPlatform, config.rollout.tensor_parallel_size + 1)
    )
    buckets_gib = 2 * readers * (config.rollout.sync_bucket_mib or platform.sync_bucket_mib) / 1024
    needed_gib = (
        _local_devices(config, derived) * CUDA_SHARED_MEMORY_GIB if cuda else SHARED_MEMORY_GIB
    )
    needed_gib += (
        buckets_gib + 2 * derived.batch_bytes / GIB
    )  # on their way through Ray's object store
    if needed_gib <= machine.shared_memory_gib:
        return []
    return [
        f"/dev/shm: needs about {needed_gib:.1f} GiB, found {machine.shared_memory_gib:.1f} GiB free; "
        f"in a container start it with --shm-size={math.ceil(needed_gib)}g"
    ]


def checkpoints_gib(plan: Plan) -> float:
    """Room for checkpoints: for one, and for a second while it replaces the first."""
    trainer = plan.job.config.trainer
    return (2 if trainer.save_freq else int(trainer.save_at_end)) * checkpoint_bytes(plan.job) / GIB


def _compare_disk(plan: Plan, machine: Machine) -> list[str]:
    trainer, needed_gib = plan.job.config.trainer, checkpoints_gib(plan)
    if needed_gib <= machine.disk_gib:
        return []
    kept = 2 if trainer.save_freq else 1
    return [
        f"disk: {kept} checkpoint(s) of {needed_gib / kept:.1f} GiB at trainer.output_dir = "
        f"{trainer.output_dir}, found {machine.disk_gib:.1f} GiB free; write elsewhere"
    ]
