"""Whether a configuration fits the nodes and the target that a job asks for.

Invariant: pure; every problem shows its arithmetic and the fix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf3d.config.groups import WorkerGroup, device_terms
from rlhf3d.config.schema import ClusterConfig, RolloutConfig, TrainerConfig
from rlhf3d.launch.options import Options
from rlhf3d.launch.rules import Named, check_shared
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.placement.resources import place
from rlhf3d.units import ceil_div, counted

SHM_GIB_PER_GPU = 8
"""Size of /dev/shm asked for with each GPU: buckets of weights, Ray's objects, NCCL."""


def startup_s(cluster: ClusterConfig) -> int:
    """Return cluster.startup_timeout_s, in complete seconds."""
    return math.ceil(cluster.startup_timeout_s)


def processes(groups: tuple[WorkerGroup, ...], rollout: RolloutConfig, nodes: int) -> list[int]:
    """Return the training and engine ranks of each node that has any, on CPU: each needs a core."""
    # On CPU every rank is a process of its own, so colocated (True) or not makes no difference.
    placed = place(
        CPUPlatform(reason="launch"),
        groups,
        rollout.engines,
        rollout.tensor_parallel_size,
        True,
        nodes,
    )
    return [int(bundle["CPU"]) for bundle in placed.bundles]


def check_nodes(
    groups: tuple[WorkerGroup, ...], rollout: RolloutConfig, nodes: int, gpus: int, options: Options
) -> list[str]:
    """Return why the job does not fit its nodes: ranks, cores, memory, and nodes without work."""
    if options.rehearse:
        return []  # `rlhf3d rehearse` makes the miniature, and checks it
    if not gpus:
        ranks = processes(groups, rollout, nodes)
        return list(_check_cpu_nodes(ranks, nodes, options.cpus_per_node))
    return [
        *_check_gpu_nodes(groups, rollout, gpus, options),
        *_check_borders(groups, rollout, nodes, gpus),
    ]


def _check_cpu_nodes(ranks: list[int], nodes: int, cores: int | None) -> Iterator[str]:
    if cores and max(ranks) > cores:
        yield (
            f"{' + '.join(map(str, ranks))} training and engine ranks on "
            f"{counted(len(ranks), 'node')}: {max(ranks)} cores, more than --cpus-per-node {cores}"
        )
    if len(ranks) < nodes:
        yield (
            f"{nodes - len(ranks)} of {counted(nodes, 'node')} would have no training rank; "
            "ask for fewer nodes"
        )


def _check_gpu_nodes(
    groups: tuple[WorkerGroup, ...], rollout: RolloutConfig, gpus: int, options: Options
) -> Iterator[str]:
    memory_gib, shm_gib = options.memory_gib_per_node, SHM_GIB_PER_GPU * gpus
    if memory_gib and memory_gib <= shm_gib:
        yield (
            f"--memory-gib-per-node {memory_gib}: /dev/shm, {SHM_GIB_PER_GPU} GiB a GPU = "
            f"{shm_gib} GiB, is part of it; give more (`rlhf3d plan` shows how much host memory "
            "a run takes)"
        )
    # All ranks that share a GPU are processes that each take a core of Ray's.
    on_each_gpu = sum(group.colocated for group in groups)
    on_each_gpu += rollout.placement == "colocated"
    cores, ranks = options.cpus_per_node, gpus * on_each_gpu
    if cores and ranks > cores:
        yield (
            f"--cpus-per-node {cores}: {gpus} GPUs hold {ranks} training and engine ranks, "
            f"each with a core; give {ranks} or more"
        )


def _check_borders(
    groups: tuple[WorkerGroup, ...], rollout: RolloutConfig, nodes: int, gpus: int
) -> Iterator[str]:
    """Tensor-parallel groups across nodes, and nodes without work."""
    if rollout.tensor_parallel_size > gpus:
        yield (
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: an engine's ranks "
            f"must be on one node, which has {gpus} GPUs"
        )
    for group in groups:
        if gpus % group.layout.tp:
            yield (
                f"{group.key}.tp = {group.layout.tp}: does not divide the {gpus} GPUs of a node, "
                "so that tensor-parallel ranks would talk over the network"
            )
    terms = device_terms(groups, rollout)
    needed = sum(count for _, count in terms)
    # Ray packs the ranks into as few nodes as hold them.
    busy = ceil_div(needed, gpus)
    if busy < nodes:
        yield (
            f"{' + '.join(text for text, _ in terms)}: {needed} GPUs are on "
            f"{counted(busy, 'node')} with {gpus} each, so {nodes - busy} of "
            f"{counted(nodes, 'node')} would be idle; ask for fewer nodes"
        )


def check_target(
    target: str,
    cluster: ClusterConfig,
    trainer: TrainerConfig,
    paths: Sequence[Named],
    workdir: str,
    options: Options,
) -> list[str]:
    """Return why the target cannot run the job: options, the paths that it names, and times."""
    problems = [
        *_check_needs(target, cluster, options),
        *_check_time(trainer.max_wall_clock_s, startup_s(cluster), options),
    ]
    if target in ("kuberay", "skypilot"):
        if not options.rehearse:  # which makes a model and prompts where it finds none
            problems += check_shared(target, paths, workdir, options.mount)
        problems += _check_output(trainer.output_dir, workdir, options.mount)
    return problems


def _check_needs(target: str, cluster: ClusterConfig, options: Options) -> Iterator[str]:
    nodes, hosts = cluster.num_nodes, len(options.host_names)
    if target == "local" and nodes > 1:
        yield f"{nodes} nodes: `local` is one machine; use slurm, kuberay, skypilot or ssh"
    if target in ("local", "ssh") and options.image:
        yield f"--image: `{target}` uses --venv; start it inside a container yourself"
    if target == "ssh" and hosts != nodes:
        yield f"--hosts names {counted(hosts, 'host')}, the job has {counted(nodes, 'node')}"
    if target == "kuberay" and not options.image:
        yield (
            "--image: KubeRay needs a container image with rlhf3d (docker/Dockerfile.gpu makes one)"
        )
    if target == "kuberay" and not options.volume:
        yield (
            "--volume: KubeRay needs a ReadWriteMany persistent volume claim with model, data "
            "and outputs"
        )
    if target == "skypilot" and cluster.platform != "cpu" and not options.gpu_type:
        yield "--gpu-type: SkyPilot needs the GPU's name, such as H100"


def _check_output(output: str, workdir: str, mount: str) -> Iterator[str]:
    if not (Path(workdir) / output).is_relative_to(mount):
        yield (
            f"trainer.output_dir = {output}: not under --mount {mount}, so it would be lost with "
            "its node and no other node would see it; "
            f"say trainer.output_dir={mount}/{output.lstrip('/')}"
        )


def _check_time(limit_s: float | None, start_s: int, options: Options) -> Iterator[str]:
    time_s, grace_s = options.time_s, options.grace_s
    if time_s is None:
        return
    if limit_s is not None and limit_s + start_s > time_s:
        yield (
            f"trainer.max_wall_clock_s {limit_s:g} + cluster.startup_timeout_s {start_s} = "
            f"{limit_s + start_s:g} s, more than --time {time_s} s"
        )
    if limit_s is None and time_s <= grace_s + start_s:
        yield (
            f"--time {time_s} s leaves nothing beside --grace {grace_s} s and "
            f"cluster.startup_timeout_s {start_s} s"
        )
