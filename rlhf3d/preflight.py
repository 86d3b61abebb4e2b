"""Whether this machine can run a configuration: what is needed beside what was found.

Invariant: only reads, and lists every shortage at once. Memory counts weights, gradients, optimizer
and engines; activations come on top, so passing is necessary and not sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf3d.config.checks import check_files
from rlhf3d.config.derived import Derived, derive, resolve_dtypes
from rlhf3d.config.groups import WorkerGroup, device_terms
from rlhf3d.config.schema import Config
from rlhf3d.machine import GIB, Machine, read_machine
from rlhf3d.models.spec import ModelSpec, check_layout, load_spec
from rlhf3d.models.weights import hf_tensors, local_params
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform

CPU_RANK_GIB = 0.4
"""Host memory of a training process before its shards (measured, torch and Megatron loaded)."""
CPU_ENGINE_GIB = 2.0
"""Host memory of a vLLM process on CPU with a small model (measured)."""
CUDA_PROCESS_GIB = 4.0
"""Host memory of a process that uses CUDA: driver, NCCL and pinned buffers (rule of thumb)."""
SHARED_MEMORY_GIB = 0.5
"""Ray's object store (256 MiB) and the rings of gloo, NCCL and vLLM for a small run."""
CUDA_SHARED_MEMORY_GIB = 1.0
"""Shared memory of each CUDA process on a host, for NCCL and vLLM (rule of thumb)."""


@dataclass(frozen=True)
class Footprint:
    """Memory of the model states of one run, GiB."""

    per_rank_gib: dict[str, float]
    """By worker group: weights, gradients and optimizer of its models on the rank that holds most."""
    weights_gib: float
    """One whole copy of the weights in the engines' dtype."""
    checkpoint_gib: float
    """One checkpoint of all trained roles with optimizer state."""


def preflight(config: Config) -> list[str]:
    """Every reason why `config` cannot run here, each with what is needed and what was found."""
    machine = read_machine(config.trainer.output_dir)
    cuda = config.cluster.platform == "cuda" or (config.cluster.platform == "auto" and bool(machine.gpus))
    platform = CUDAPlatform(reason="preflight") if cuda else CPUPlatform(reason="preflight")
    config = resolve_dtypes(config, platform.fast_dtype)
    derived = derive(config)
    problems = check_files(config)
    try:
        specs = group_specs(derived)
        for group in derived.groups:
            check_layout(specs[group.name], group.layout, group.layout_config.sequence_parallel)
        footprint = model_footprint(config, derived, specs)
    except ValueError:  # reported by check_files; what does not depend on the model is still compared
        footprint = Footprint({}, 0.0, 0.0)
    compare = _compare_cuda if cuda else _compare_cpu
    if config.cluster.ray_address is None or not cuda:  # a remote cluster's nodes cannot be read from here
        problems += compare(config, derived, machine, footprint)
    return problems + _compare_disk(config, machine, footprint)


def count_parameters(spec: ModelSpec) -> int:
    """Parameters of the decoder with its LM head."""
    return sum(math.prod(shape) for shape in hf_tensors(spec, "lm").values())


def largest_rank_parameters(spec: ModelSpec, layout: ParallelLayout) -> int:
    """Parameters of the policy on the training rank that holds most."""
    shards = {(at.tp, at.pp, at.ep): at for at in map(layout.coords, range(layout.world_size))}
    return max(
        sum(math.prod(p.shape) for chunk in range(layout.vpp) for p in local_params(spec, layout, at, chunk))
        for at in shards.values()
    )


def group_specs(derived: Derived) -> dict[str, ModelSpec]:
    """The shape of each worker group's models."""
    return {group.name: load_spec(group.model) for group in derived.groups}


def model_footprint(config: Config, derived: Derived, specs: Mapping[str, ModelSpec]) -> Footprint:
    """Model states of a configuration whose dtypes are resolved; `specs` by worker group.

    Bytes a parameter: weights 2 (bf16) or 4, gradients 4, Adam 8, and for bf16 a master copy of 4. The distributed
    optimizer shards Adam and master copy over the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054).
    """
    trained = 1 + config.needs_critic
    parameters = count_parameters(specs["actor"])
    weights = 2 if config.model.dtype == "bfloat16" else 4
    optimizer = 12 if config.model.dtype == "bfloat16" else 8

    def per_rank_gib(group: WorkerGroup) -> float:
        sharded = group.layout.dp if group.layout_config.distributed_optimizer else 1
        trainable = weights + 4 + optimizer / sharded
        bytes_of = {"actor": trainable, "critic": trainable, "ref": weights, "reward": weights}
        parameters = largest_rank_parameters(specs[group.name], group.layout)
        return parameters * sum(bytes_of[role] for role in group.roles) / GIB

    return Footprint(
        per_rank_gib={group.name: per_rank_gib(group) for group in derived.groups},
        weights_gib=parameters * (2 if config.rollout.dtype == "bfloat16" else 4) / GIB,
        checkpoint_gib=trained * parameters * (weights + optimizer) / GIB,
    )


def _compare_cuda(config: Config, derived: Derived, machine: Machine, footprint: Footprint) -> list[str]:
    nodes, terms = config.cluster.num_nodes, device_terms(config)
    local = math.ceil(max(sum(count for _, count in terms), derived.engine_ranks) / nodes)
    problems = []
    if len(machine.gpus) < local:
        groups = ", ".join(f"{group.name} group {group.layout}" for group in derived.groups)
        problems.append(
            f"cluster.platform = {config.cluster.platform}: needs {local} GPUs on each of {nodes} node(s) "
            f"for {groups} and {derived.engine_ranks} engine rank(s), found {len(machine.gpus)}; "
            "run it where they are, or use a smaller layout"
        )
    if machine.gpus:
        smallest = min(memory for _, memory in machine.gpus)
        problems += compare_gpu_memory(config, derived, footprint, smallest)
    processes = math.ceil(derived.world_size / nodes) + math.ceil(derived.engine_ranks / nodes)
    parts = {f"{processes} processes": processes * CUDA_PROCESS_GIB, "weight syncs": _sync_gib(config)}
    problems += _compare_memory(machine, parts)
    return problems + _compare_shared_memory(machine, local * CUDA_SHARED_MEMORY_GIB + _sync_gib(config))


def compare_gpu_memory(config: Config, derived: Derived, footprint: Footprint, smallest: float) -> list[str]:
    """Model states, and engines, that share a GPU of `smallest` GiB: those beside the actor, and each group apart."""
    share = config.rollout.gpu_memory_utilization * (config.rollout.placement == "colocated")
    beside = [group for group in derived.groups if group is derived.groups[0] or group.colocated]
    together = [(beside, share * smallest), *(([group], 0.0) for group in derived.groups if group not in beside)]
    problems = []
    for groups, engine in together:
        states = {group.name: footprint.per_rank_gib.get(group.name, 0.0) for group in groups}
        if sum(states.values()) + engine > smallest:
            named = " + ".join(f"{name} {gib:.1f}" for name, gib in states.items())
            vllm = f" + rollout.gpu_memory_utilization {share:g} x {smallest:.1f} = {engine:.1f} GiB" if engine else ""
            problems.append(
                f"GPU memory: model states of {sum(states.values()):.1f} GiB a rank ({named}){vllm}, found "
                f"{smallest:.1f} GiB; raise {groups[0].key}.tp, pp or dp{', or lower the utilization' * bool(engine)}"
            )
    return problems


def _compare_cpu(config: Config, derived: Derived, machine: Machine, footprint: Footprint) -> list[str]:
    training = {
        group.name: group.layout.world_size * (CPU_RANK_GIB + footprint.per_rank_gib.get(group.name, 0.0))
        for group in derived.groups
    }
    # vLLM's CPU kernels keep a packed copy beside the weights.
    engine = CPU_ENGINE_GIB * config.rollout.tensor_parallel_size + 2 * footprint.weights_gib
    engines = config.rollout.engines * (engine + config.rollout.kv_cache_gib)
    parts = {**{f"{name} group": gib for name, gib in training.items()}, "engines": engines}
    problems = _compare_memory(machine, parts)
    if config.rollout.expert_parallel and config.rollout.tensor_parallel_size > 1:
        problems.append(
            f"rollout.expert_parallel with rollout.tensor_parallel_size = {config.rollout.tensor_parallel_size}: "
            "vLLM's CPU kernel ignores which experts a rank has, and crashes; set it to false on CPU"
        )
    return problems + _compare_shared_memory(machine, SHARED_MEMORY_GIB + _sync_gib(config))


def _sync_gib(config: Config) -> float:
    """Shared memory of weight syncs and exports: two buckets for each tensor-parallel rank of vLLM and the reader."""
    return 2 * (config.rollout.tensor_parallel_size + 1) * config.rollout.sync_bucket_mib / 1024


def _compare_memory(machine: Machine, parts_gib: dict[str, float]) -> list[str]:
    needed_gib = sum(parts_gib.values())
    if needed_gib <= machine.memory_available_gib:
        return []
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in parts_gib.items())
    return [
        f"host memory: needs about {needed_gib:.1f} GiB ({parts}), found {machine.memory_available_gib:.1f} GiB "
        f"available of {machine.memory_gib:.1f}; close other programs, or use a smaller model or fewer ranks"
    ]


def _compare_shared_memory(machine: Machine, needed_gib: float) -> list[str]:
    if needed_gib <= machine.shared_memory_gib:
        return []
    return [
        f"/dev/shm: needs about {needed_gib:.1f} GiB, found {machine.shared_memory_gib:.1f} GiB free; "
        f"in a container start it with --shm-size={math.ceil(needed_gib)}g"
    ]


def checkpoints_at_once(config: Config) -> int:
    """Checkpoints that must find room: one, and a second while it replaces the first."""
    return 2 if config.trainer.save_freq else int(config.trainer.save_at_end)


def _compare_disk(config: Config, machine: Machine, footprint: Footprint) -> list[str]:
    trainer, kept = config.trainer, checkpoints_at_once(config)
    if kept * footprint.checkpoint_gib <= machine.disk_gib:
        return []
    return [
        f"disk: {kept} checkpoint(s) of {footprint.checkpoint_gib:.1f} GiB at trainer.output_dir = "
        f"{trainer.output_dir}, found {machine.disk_gib:.1f} GiB free; write elsewhere"
    ]
