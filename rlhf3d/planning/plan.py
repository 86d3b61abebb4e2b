"""The memory of a run before it starts: what each rank needs in each phase, against what there is.

Invariant: a plan is a value, computed from a configuration, a model's shape and a cluster alone;
nothing is started. The time of a step is planned by `rlhf3d.planning.search`, which training never
imports.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf3d import machine
from rlhf3d.config.groups import device_terms
from rlhf3d.config.schema import ClusterConfig, Config
from rlhf3d.models.engine_weights import check_engine_layout
from rlhf3d.models.spec import ModelSpec, check_layout, load_spec
from rlhf3d.paths import CONFIGS
from rlhf3d.planning.hardware import FILE, Cluster, Hardware, load_hardware, parse_cluster
from rlhf3d.planning.job import Job, Lengths, make_job
from rlhf3d.planning.memory import MemoryPlan, plan_memory

SHAPES = CONFIGS / "models"
"""Folders with the config.json of public models, to plan without their weights."""
DEFAULT_GPU = "H100"
DEFAULT_CPU = "laptop"


@dataclass(frozen=True)
class Plan:
    """A job and the memory that it needs."""

    job: Job
    memory: MemoryPlan

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
            wanted = device_terms(job.derived.groups, job.config.rollout)
            terms = " + ".join(text for text, _ in wanted)
            found.append(f"devices: {terms} need {job.devices_needed}, found {job.cluster}")
        return (*found, *self.memory.problems)


def make_plan(
    config: Config,
    spec: ModelSpec,
    cluster: Cluster,
    rows: int | None = None,
    lengths: Lengths | None = None,
) -> Plan:
    """Return the plan of a checked configuration; `rows` of training data for a run in epochs.

    Raises ValueError where model and layout do not fit each other.
    """
    job = make_job(config, spec, cluster, rows, lengths)
    for model in job.models:
        check_layout(model.spec, model.layout, model.settings.sequence_parallel)
    check_engine_layout(spec, config.rollout.tensor_parallel_size, config.rollout.expert_parallel)
    return Plan(job, plan_memory(job))


def find_spec(model_path: str, model_config: Path | None = None) -> tuple[ModelSpec, Path]:
    """Return a model's shape, and the folder that it was read from.

    That is `model_config` (config.json or its folder), `model_path`, or the shape that is shipped
    under that name. Raises ValueError as `load_spec` does.
    """
    if model_config is not None:
        folder = model_config.parent if model_config.suffix == ".json" else model_config
        return load_spec(folder, with_weights=False), folder
    folder = Path(model_path)
    shipped = SHAPES / folder.name
    if not folder.is_dir() and shipped.is_dir():
        folder = shipped
    return load_spec(folder, with_weights=False), folder


def find_cluster(wanted: ClusterConfig, gpus: str | None, hardware: Path | None = None) -> Cluster:
    """Return the devices to plan for: `gpus`, such as 8xH100; else those `wanted`, or this host."""
    # The user's entries replace shipped ones of the same name.
    known = load_hardware(FILE) | (load_hardware(hardware) if hardware else {})
    if gpus is not None:
        return parse_cluster(gpus, known)
    if wanted.platform == "cuda":
        return Cluster(
            known[DEFAULT_GPU], wanted.num_nodes * wanted.gpus_per_node, wanted.gpus_per_node
        )
    return this_host(known[DEFAULT_CPU])


def this_host(hardware: Hardware) -> Cluster:
    """Return one host without GPUs, with the memory of this one."""
    return Cluster(replace(hardware, host_memory_gib=machine.memory_gib()), 1, 1)
