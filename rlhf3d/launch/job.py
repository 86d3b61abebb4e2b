"""A job as its templates see it: what is run, on how many nodes, with what of each.

Invariant: a `Job` fits the nodes it asks for; whatever does not fit is refused with the arithmetic. Pure: reads the
configuration, starts nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from rlhf3d.config.checks import check, value_of
from rlhf3d.config.groups import device_terms, worker_groups
from rlhf3d.config.load import PATHS, ConfigError, files_of, load_config
from rlhf3d.config.schema import Config
from rlhf3d.launch.rules import (
    check_names,
    check_shared,
    default_name,
    is_below,
    mounts_of,
    named_paths,
)
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.paths import expand_user
from rlhf3d.placement.resources import place
from rlhf3d.rehearsal.shrink import ENGINE_RANKS, MAX_RANKS

CPUS_PER_GPU = 8
"""Cores asked for beside each GPU where the user does not say (training rank, engine rank, scoring, data)."""
SHM_GIB_PER_GPU = 8
"""Size of /dev/shm asked for beside each GPU: buckets of weights, Ray's objects, NCCL."""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
RETRIES = {"slurm": 20, "kuberay": 3}
"""Attempts after the first: of Slurm those after exit code 75 alone, of KubeRay those after any failure."""
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""What Ray's processes must have in their environment on every node."""


@dataclass(frozen=True)
class Options:
    """What the user says beside the configuration; None for what follows from it."""

    rehearse: bool = False
    """Run the job's miniature, on CPU."""
    name: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    """0 for a job on CPU."""
    cpus_per_node: int | None = None
    memory_gib_per_node: int | None = None
    gpu_type: str | None = None
    """SkyPilot's name of the GPU, such as H100."""
    image: str | None = None
    """Container image with rlhf3d installed."""
    venv: str = ".venv"
    """Environment with rlhf3d, relative to the working folder; not used where there is an image."""
    workdir: str | None = None
    volume: str | None = None
    """Shared volume (a persistent volume claim, a SkyPilot volume)."""
    mount: str = "/shared"
    """Where it is mounted."""
    time_s: int | None = None
    grace_s: int = 300
    """Time before the end in which the run is told to save: longer than a step and a checkpoint."""
    retries: int | None = None
    partition: str | None = None
    account: str | None = None
    queue: str | None = None
    """Kueue's local queue."""
    namespace: str | None = None
    hosts: tuple[str, ...] = ()
    port: int | None = None
    """Of Ray's head."""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """The values of a template."""

    name: str
    command: tuple[str, ...]
    """`rlhf3d train` or `rehearse` with all that is known before the job starts."""
    nodes: int
    gpus_per_node: int
    cpus_per_node: int | None
    """None for all that a node has."""
    memory_gib_per_node: int | None
    shm_gib: int
    gpu_type: str | None
    image: str | None
    venv: str
    workdir: str
    mounts: tuple[str, ...]
    """Folders that a container of Slurm needs beside the working folder."""
    made: tuple[str, ...]
    """Those of them that the job makes."""
    volume: str | None
    mount: str
    time_s: int | None
    grace_s: int
    retries: int
    startup_s: int
    """Deadline for the head of Ray, and then for all nodes, to come up."""
    partition: str | None
    account: str | None
    queue: str | None
    namespace: str | None
    hosts: tuple[str, ...]
    port: int | None
    env: dict[str, str]
    ray_version: str


def make_job(target: str, path: str, overrides: Sequence[str], options: Options) -> Job:
    """The job of `rlhf3d train path overrides` for a target. Raises ConfigError when it does not fit."""
    if problems := list(check_names(target, options)):
        raise ConfigError(problems, f"`{target}` does not take these options")
    config = load_config(path, overrides, files=False)
    if options.rehearse:
        options = replace(
            options,
            gpus_per_node=0,
            cpus_per_node=options.cpus_per_node or MAX_RANKS + ENGINE_RANKS,
        )
    config = _with_nodes(config, target, options)
    gpus = 0 if config.cluster.platform == "cpu" else config.cluster.gpus_per_node
    nodes = config.cluster.num_nodes
    if problems := [
        *check(config),
        *_check_nodes(config, gpus, options),
        *_check_target(target, config, options),
    ]:
        raise ConfigError(
            problems, f"{path} does not fit {nodes} node(s) with {gpus or 'no'} GPU(s) each"
        )
    time_s = _time_s(config, options)
    workdir = options.workdir or _workdir(target, options)
    if target == "slurm":  # which expands no ~
        workdir = expand_user(workdir)
    mounts: tuple[str, ...] = ()
    if in_container := target == "slurm" and options.image is not None:
        workdir = os.path.abspath(workdir)
        mounts = mounts_of(config, workdir, files_of(Path(path)))
    places = [f"cluster.platform={config.cluster.platform}", f"cluster.num_nodes={nodes}"]
    places += [f"cluster.gpus_per_node={gpus}"] if gpus else []
    if time_s is not None and config.trainer.max_wall_clock_s is None and target != "slurm":
        places.append(
            f"trainer.max_wall_clock_s={max(1, time_s - config_startup_s(config) - options.grace_s)}"
        )
    if in_container:
        places += _without_home(config)
    return Job(
        name=options.name or default_name(target, path),
        command=("rlhf3d", "rehearse" if options.rehearse else "train", path, *overrides, *places),
        nodes=nodes,
        gpus_per_node=gpus,
        cpus_per_node=options.cpus_per_node or _cpus_per_node(config, target, gpus),
        memory_gib_per_node=options.memory_gib_per_node,
        shm_gib=max(4, SHM_GIB_PER_GPU * gpus),
        gpu_type=options.gpu_type,
        image=options.image,
        venv=options.venv,
        workdir=workdir,
        mounts=mounts,
        made=tuple(folder for folder in mounts if folder in _written(config, workdir)),
        volume=options.volume,
        mount=options.mount,
        time_s=time_s,
        grace_s=options.grace_s,
        retries=RETRIES.get(target, 0) if options.retries is None else options.retries,
        startup_s=config_startup_s(config),
        partition=options.partition,
        account=options.account,
        queue=options.queue,
        namespace=options.namespace,
        hosts=options.hosts,
        port=options.port,
        env={**ENVIRONMENT, **options.env},
        ray_version=metadata.version("ray"),
    )


def config_startup_s(config: Config) -> int:
    """cluster.startup_timeout_s in whole seconds."""
    return math.ceil(config.cluster.startup_timeout_s)


def parse_duration(text: str) -> int:
    """Seconds of 90m, 4h, 2d, 3600s, HH:MM:SS or D-HH:MM:SS. Raises ValueError."""
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        return int(match[1]) * SECONDS[match[2]]
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    raise ValueError(f"{text!r} is no duration: write 90m, 4h, 2d, HH:MM:SS or D-HH:MM:SS")


def _with_nodes(config: Config, target: str, options: Options) -> Config:
    """The configuration with the nodes that the options ask for."""
    cluster = config.cluster
    nodes = options.nodes or (len(options.hosts) if target == "ssh" else 0) or cluster.num_nodes
    cluster = replace(cluster, num_nodes=nodes)
    if options.gpus_per_node == 0:
        cluster = replace(cluster, platform="cpu")
    elif options.gpus_per_node:
        cluster = replace(cluster, platform="cuda", gpus_per_node=options.gpus_per_node)
    elif cluster.platform == "auto":  # this machine does not tell what the job's has
        cluster = replace(cluster, platform="cuda")
    return replace(config, cluster=cluster)


def _processes(config: Config) -> list[int]:
    """Training and engine ranks of each node that has any, on CPU, each with a core of its own."""
    rollout, nodes = config.rollout, config.cluster.num_nodes
    placed = place(
        CPUPlatform(reason="launch"),
        worker_groups(config),
        rollout.engines,
        rollout.tensor_parallel_size,
        True,
        nodes,
    )
    return [int(bundle["CPU"]) for bundle in placed.bundles]


def _processes_beside_gpus(config: Config, gpus: int) -> int:
    """Ranks that share the GPUs of a node."""
    rollout = config.rollout
    colocated = [group for group in worker_groups(config) if group.colocated]
    return gpus * (len(colocated) + (rollout.placement == "colocated"))


def _written(config: Config, workdir: str) -> set[str]:
    """Folders that the run makes."""
    keys = ("trainer.output_dir", "data.cache_dir")
    return {named.path for named in named_paths(config, workdir) if named.key in keys}


def _without_home(config: Config) -> list[str]:
    """Overrides that say what ~ is here: a container's home folder is another."""
    home, said = os.path.expanduser("~"), []
    for key in PATHS:
        value = value_of(config, key)
        texts = value if isinstance(value, tuple) else (value,)
        if any(
            text is not None and is_below(text, home) and text.startswith("/") for text in texts
        ):
            said.append(f"{key}={json.dumps(value) if isinstance(value, tuple) else value}")
    return said


def _cpus_per_node(config: Config, target: str, gpus: int) -> int | None:
    if not gpus:
        return max(_processes(config))
    return CPUS_PER_GPU * gpus if target == "kuberay" else None


def _check_nodes(config: Config, gpus: int, options: Options) -> list[str]:
    """What must not be cut by the border between nodes, idle nodes, and cores of a job on CPU."""
    rollout, nodes = config.rollout, config.cluster.num_nodes
    problems = []
    if options.rehearse:
        return []  # of the miniature that is told where it is made
    if not gpus:
        processes, cores = _processes(config), options.cpus_per_node
        if cores and max(processes) > cores:
            problems.append(
                f"{' + '.join(map(str, processes))} training and engine ranks on {len(processes)} node(s): "
                f"{max(processes)} cores, more than --cpus-per-node {cores}"
            )
        if len(processes) < nodes:
            problems.append(
                f"{nodes - len(processes)} of {nodes} node(s) would have no training rank; ask for fewer"
            )
        return problems
    memory_gib, shm_gib = options.memory_gib_per_node, SHM_GIB_PER_GPU * gpus
    if memory_gib and memory_gib <= shm_gib:
        problems.append(
            f"--memory-gib-per-node {memory_gib}: /dev/shm, {SHM_GIB_PER_GPU} GiB a GPU = {shm_gib} GiB, is part of "
            "it; give more (`rlhf3d plan` tells how much host memory a run takes)"
        )
    cores, needed_cores = options.cpus_per_node, _processes_beside_gpus(config, gpus)
    if cores and needed_cores > cores:
        problems.append(
            f"--cpus-per-node {cores}: {gpus} GPUs hold {needed_cores} training and engine ranks, each with a core; "
            f"give {needed_cores} or more"
        )
    if rollout.tensor_parallel_size > gpus:
        problems.append(
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: an engine's ranks must be on one node, "
            f"which has {gpus} GPUs"
        )
    for group in worker_groups(config):
        if group.layout.tp > gpus or gpus % group.layout.tp:
            problems.append(
                f"{group.key}.tp = {group.layout.tp}: does not divide the {gpus} GPUs of a node, so that tensor-"
                "parallel ranks would talk over the network"
            )
    terms = device_terms(config)
    needed = sum(count for _, count in terms)
    if needed <= gpus * (nodes - 1):
        problems.append(
            f"{' + '.join(text for text, _ in terms)}: {needed} GPUs are on {math.ceil(needed / gpus)} node(s) with "
            f"{gpus} each, so {nodes - math.ceil(needed / gpus)} of {nodes} node(s) would be idle; ask for fewer nodes"
        )
    return problems


def _check_target(target: str, config: Config, options: Options) -> list[str]:
    """What a target needs to know, and where it can write."""
    nodes, output = config.cluster.num_nodes, config.trainer.output_dir
    problems = []
    if target == "local" and nodes > 1:
        problems.append(
            f"{nodes} nodes: `local` is one machine; use slurm, kuberay, skypilot or ssh"
        )
    if target in ("local", "ssh") and options.image:
        problems.append(f"--image: `{target}` uses --venv; start it inside a container yourself")
    if target == "ssh" and len(options.hosts) != nodes:
        problems.append(f"--hosts names {len(options.hosts)} host(s), the job has {nodes} node(s)")
    if target == "kuberay" and not options.image:
        problems.append(
            "--image: KubeRay needs a container image with rlhf3d (docker/Dockerfile.gpu makes one)"
        )
    if target == "kuberay" and not options.volume:
        problems.append(
            "--volume: KubeRay needs a ReadWriteMany persistent volume claim with model, data and outputs"
        )
    if target == "skypilot" and config.cluster.platform != "cpu" and not options.gpu_type:
        problems.append("--gpu-type: SkyPilot needs the GPU's name, such as H100")
    if target in ("kuberay", "skypilot"):
        workdir = Path(options.workdir or _workdir(target, options))
        if not options.rehearse:  # which makes a model and prompts where it finds none
            problems += check_shared(target, config, str(workdir), options.mount)
        if not (workdir / output).is_relative_to(options.mount):
            problems.append(
                f"trainer.output_dir = {output}: not under --mount {options.mount}, so it would be lost with its node "
                f"and no other node would see it; say trainer.output_dir={options.mount}/{output.lstrip('/')}"
            )
    if options.time_s is not None and (limit_s := config.trainer.max_wall_clock_s) is not None:
        startup_s = config_startup_s(config)
        if limit_s + startup_s > options.time_s:
            problems.append(
                f"trainer.max_wall_clock_s {limit_s:g} + cluster.startup_timeout_s {startup_s} = "
                f"{limit_s + startup_s:g} s, more than --time {options.time_s} s"
            )
    elif options.time_s is not None and options.time_s <= options.grace_s + config_startup_s(
        config
    ):
        problems.append(
            f"--time {options.time_s} s leaves nothing beside --grace {options.grace_s} s and "
            f"cluster.startup_timeout_s {config_startup_s(config)} s"
        )
    return problems


def _time_s(config: Config, options: Options) -> int | None:
    """Time limit of the job: as asked for, or what the run's own limit needs."""
    if options.time_s is not None or config.trainer.max_wall_clock_s is None:
        return options.time_s
    return 60 * math.ceil((config.trainer.max_wall_clock_s + config_startup_s(config)) / 60)


def _workdir(target: str, options: Options) -> str:
    """The folder in which the job runs: here, or where a container or a rented machine has the project's files."""
    return {"kuberay": options.mount, "skypilot": "~/sky_workdir"}.get(target) or str(Path.cwd())
