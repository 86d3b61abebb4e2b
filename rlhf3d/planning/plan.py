"""A run in numbers before it starts: memory by rank and phase against what there is, and the time of a step.

Invariant: a plan is a value, computed from a configuration, a model's shape and a cluster alone; nothing is started.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf3d.config.groups import device_terms
from rlhf3d.config.schema import Config
from rlhf3d.models.engine_weights import check_engine_layout
from rlhf3d.models.spec import ModelSpec, check_layout, load_spec
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.planning.hardware import (
    FILE,
    Cluster,
    Hardware,
    load_hardware,
    parse_cluster,
    with_numbers,
)
from rlhf3d.planning.job import Job, Lengths, make_job
from rlhf3d.planning.memory import MemoryPlan, plan_memory
from rlhf3d.planning.times import TimePlan, plan_time

SHAPES = Path(__file__).parents[2] / "configs" / "models"
"""Folders with the config.json of public models, to plan without their weights."""
DEFAULT_GPU = "H100"
DEFAULT_CPU = "laptop"


@dataclass(frozen=True)
class Plan:
    """What a job needs."""

    job: Job
    memory: MemoryPlan
    time: TimePlan | None
    """None where the engines cannot start."""

    @property
    def step_s(self) -> float:
        """Seconds of a step; infinite where there is none."""
        return math.inf if self.time is None else self.time.step_s

    @property
    def verdict(self) -> Literal["fits", "tight", "does not fit"]:
        """tight: it fits, with less to spare than what is not counted may take."""
        if self.problems:
            return "does not fit"
        return "tight" if self.memory.tight else "fits"

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it cannot run on the cluster; empty where it can."""
        job, found = self.job, []
        if job.on_gpu and job.devices_needed > job.cluster.devices:
            terms = " + ".join(text for text, _ in device_terms(job.config))
            found.append(f"devices: {terms} need {job.devices_needed}, found {job.cluster}")
        return (*found, *self.memory.problems)


def make_plan(
    config: Config,
    spec: ModelSpec,
    cluster: Cluster,
    rows: int | None = None,
    lengths: Lengths | None = None,
) -> Plan:
    """The plan of a checked configuration; `rows` of training data for a run in epochs.

    Raises ValueError where model and layout do not fit each other.
    """
    job = make_job(config, spec, cluster, rows, lengths)
    for model in job.models:
        check_layout(model.spec, model.layout, model.settings.sequence_parallel)
    check_engine_layout(spec, config.rollout.tensor_parallel_size, config.rollout.expert_parallel)
    memory = plan_memory(job)
    return Plan(job, memory, None if memory.engine.missing else plan_time(job))


def find_spec(config: Config, model_config: Path | None = None) -> tuple[ModelSpec, Path]:
    """The model's shape and where it was read: `model_config` (config.json or its folder), model.path, or the shape
    that is shipped under model.path's name. Raises ValueError as `load_spec` does.
    """
    if model_config is not None:
        folder = model_config.parent if model_config.suffix == ".json" else model_config
        return load_spec(folder, with_weights=False), folder
    folder, shipped = Path(config.model.path), SHAPES / Path(config.model.path).name
    if not folder.is_dir() and shipped.is_dir():
        folder = shipped
    return load_spec(folder, with_weights=False), folder


def find_cluster(config: Config, gpus: str | None, hardware: Path | None = None) -> Cluster:
    """The devices to plan for: `gpus` such as 8xH100; else as many as a CUDA configuration asks for, or this host."""
    known = load_hardware(FILE) | (load_hardware(hardware) if hardware else {})
    wanted = config.cluster
    if gpus is not None:
        return parse_cluster(gpus, known)
    if wanted.platform == "cuda":
        return Cluster(
            known[DEFAULT_GPU], wanted.num_nodes * wanted.gpus_per_node, wanted.gpus_per_node
        )
    return this_host(known[DEFAULT_CPU])


def this_host(hardware: Hardware) -> Cluster:
    """One host without GPUs, with the memory of this one."""
    return Cluster(
        with_numbers(hardware, host_memory_gib=CPUPlatform(reason="plan").memory_gib()), 1, 1
    )


def train_rows(config: Config) -> int | None:
    """Prompts of data.train_files, from the files' footers; None where one is not there.

    ValueError naming the file that holds no prompts.
    """
    files = [Path(name) for name in config.data.train_files]
    if not files or not all(file.is_file() for file in files):
        return None
    from rlhf3d.data.rows import open_parquet

    return sum(int(open_parquet(file).metadata.num_rows) for file in files)
