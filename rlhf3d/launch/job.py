"""A job as its templates see it: the command, on how many nodes, and what it gets of each.

Invariant: a `Job` fits the nodes it asks for; whatever does not fit is refused with the arithmetic.
Pure: reads the configuration, starts nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf3d.config.checks import check
from rlhf3d.config.groups import worker_groups
from rlhf3d.config.keys import named_paths
from rlhf3d.config.load import ConfigError, files_of
from rlhf3d.config.resolve import load_run
from rlhf3d.config.schema import ClusterConfig, TrainerConfig
from rlhf3d.launch.fit import SHM_GIB_PER_GPU, check_nodes, check_target, processes, startup_s
from rlhf3d.launch.options import Options
from rlhf3d.launch.rules import check_names, default_name, is_below, located, mounts_of
from rlhf3d.paths import expand_user
from rlhf3d.rehearsal.shrink import ENGINE_RANKS, MAX_RANKS
from rlhf3d.units import counted

CPUS_PER_GPU = 8
"""Cores asked for with each GPU by default (training rank, engine rank, scoring, data)."""
RETRIES = {"slurm": 20, "kuberay": 3}
"""Attempts after the first: on Slurm after exit code 75 alone, on KubeRay after any failure."""
WRITTEN = ("trainer.output_dir", "data.cache_dir")
"""Keys of the folders that a run makes."""
# Without the second Ray empties CUDA_VISIBLE_DEVICES of processes that ask for no GPU.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment variables of Ray's processes on every node."""


@dataclass(frozen=True)
class Job:
    """The values of a template that are not options."""

    options: Options
    name: str
    command: tuple[str, ...]
    """`rlhf3d train` or `rehearse` with all that is known before the job starts."""
    nodes: int
    gpus_per_node: int
    cpus_per_node: int | None
    """None for all that a node has."""
    shm_gib: int
    workdir: str
    mounts: tuple[str, ...]
    """Folders that a container of Slurm needs beside the working folder."""
    made: tuple[str, ...]
    """Those of `mounts` that the job makes."""
    time_s: int | None
    retries: int
    startup_s: int
    """Deadline for the head of Ray, and then for all nodes, to come up."""
    env: dict[str, str]
    ray_version: str


def make_job(target: str, path: str, overrides: Sequence[str], options: Options) -> Job:
    """Return the job of `rlhf3d train path overrides` for a target.

    ConfigError if it does not fit.
    """
    env = {**ENVIRONMENT, **options.environment()}
    if problems := list(check_names(target, options)):
        raise ConfigError(problems, f"`{target}` does not take these options")
    if options.rehearse:
        # A rehearsal runs on CPUs alone: a core for each process of the miniature at its largest.
        cores = options.cpus_per_node or MAX_RANKS + ENGINE_RANKS
        options = replace(options, gpus_per_node=0, cpus_per_node=cores)
    config = load_run(path, overrides)
    config = replace(config, cluster=_with_nodes(config.cluster, target, options))
    cluster, trainer, rollout = config.cluster, config.trainer, config.rollout
    nodes, groups = cluster.num_nodes, worker_groups(config)
    gpus = 0 if cluster.platform == "cpu" else cluster.gpus_per_node
    workdir = options.workdir or _default_workdir(target, options)
    problems = check(config) + check_nodes(groups, rollout, nodes, gpus, options)
    paths = named_paths(config)
    problems += check_target(target, cluster, trainer, located(paths, workdir), workdir, options)
    if problems:
        each = counted(gpus, "GPU") if gpus else "no GPUs"
        raise ConfigError(
            problems, f"{path} does not fit {counted(nodes, 'node')} with {each} each"
        )
    if target == "slurm":
        workdir = expand_user(workdir)  # Slurm expands no ~
    mounts: tuple[str, ...] = ()
    more = _overrides_of_place(cluster, trainer, target, gpus, options)
    if target == "slurm" and options.image is not None:
        # `mounts_of` compares absolute paths.
        workdir = os.path.abspath(workdir)
        mounts = mounts_of(located(paths, workdir, files_of(Path(path))), workdir)
        more += _overrides_of_home(paths)
    written = {each.path for each in located(paths, workdir) if each.key in WRITTEN}
    cpus = options.cpus_per_node
    if cpus is None and not gpus:
        cpus = max(processes(groups, rollout, nodes))
    elif cpus is None and target == "kuberay":
        cpus = CPUS_PER_GPU * gpus
    start_s = startup_s(cluster)
    retries = RETRIES.get(target, 0) if options.retries is None else options.retries
    return Job(
        options=options,
        name=options.name or default_name(target, path),
        command=("rlhf3d", "rehearse" if options.rehearse else "train", path, *overrides, *more),
        nodes=nodes,
        gpus_per_node=gpus,
        cpus_per_node=cpus,
        shm_gib=max(4, SHM_GIB_PER_GPU * gpus),
        workdir=workdir,
        mounts=mounts,
        made=tuple(folder for folder in mounts if folder in written),
        time_s=_time_s(trainer.max_wall_clock_s, start_s, options),
        retries=retries,
        startup_s=start_s,
        env=env,
        ray_version=metadata.version("ray"),
    )


def _with_nodes(cluster: ClusterConfig, target: str, options: Options) -> ClusterConfig:
    """The section with the nodes that the options ask for."""
    hosts = len(options.host_names) if target == "ssh" else 0
    cluster = replace(cluster, num_nodes=options.nodes or hosts or cluster.num_nodes)
    if options.gpus_per_node == 0:
        return replace(cluster, platform="cpu")
    if options.gpus_per_node:
        return replace(cluster, platform="cuda", gpus_per_node=options.gpus_per_node)
    if cluster.platform == "auto":  # what this machine has says nothing about the job's
        return replace(cluster, platform="cuda")
    return cluster


def _overrides_of_place(
    cluster: ClusterConfig, trainer: TrainerConfig, target: str, gpus: int, options: Options
) -> list[str]:
    """Overrides that say what the run will find, and when it has to end."""
    overrides = [f"cluster.platform={cluster.platform}", f"cluster.num_nodes={cluster.num_nodes}"]
    if gpus:
        overrides.append(f"cluster.gpus_per_node={gpus}")
    # Slurm sends a signal before the end; elsewhere the run has to know the time itself.
    time_s = options.time_s
    if time_s is not None and trainer.max_wall_clock_s is None and target != "slurm":
        # The job's time begins before Ray is up, and ends when the run has had its time to save.
        limit_s = time_s - startup_s(cluster) - options.grace_s
        overrides.append(f"trainer.max_wall_clock_s={max(1, limit_s)}")
    return overrides


def _overrides_of_home(paths: Mapping[str, Any]) -> list[str]:
    """Overrides that say what ~ is here: a container's home folder is another."""
    home = os.path.expanduser("~")
    overrides = []
    for key, value in paths.items():
        texts = value if isinstance(value, tuple) else (value,)
        absolute = [path for path in texts if path.startswith("/")]
        if any(is_below(path, home) for path in absolute):
            # Overrides are read as YAML, of which JSON is a part.
            text = json.dumps(value) if isinstance(value, tuple) else value
            overrides.append(f"{key}={text}")
    return overrides


def _time_s(limit_s: float | None, start_s: int, options: Options) -> int | None:
    """Time limit of the job: as asked for, or what the run's own limit needs, in minutes."""
    if options.time_s is not None or limit_s is None:
        return options.time_s
    # Slurm limits time in minutes.
    return 60 * math.ceil((limit_s + start_s) / 60)


def _default_workdir(target: str, options: Options) -> str:
    """The current folder, or where a container or a rented machine has the project's files."""
    elsewhere = {"kuberay": options.mount, "skypilot": "~/sky_workdir"}
    return elsewhere.get(target) or str(Path.cwd())
