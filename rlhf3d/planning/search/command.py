"""`rlhf3d plan`: a plan or a search on the screen, as JSON, or as a configuration.

Invariant: starts nothing, and writes only the file that --write names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlhf3d import machine
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import ClusterConfig, Config, DataConfig
from rlhf3d.planning.hardware import FILE, Cluster, Hardware, load_hardware, parse_cluster
from rlhf3d.planning.job import Lengths
from rlhf3d.planning.measured import with_measured
from rlhf3d.planning.plan import DEFAULT_CPU, DEFAULT_GPU, find_spec
from rlhf3d.planning.search.plan import make_timed_plan
from rlhf3d.planning.search.ranking import Search
from rlhf3d.planning.search.view import plan_view, search_view


def plan_command(
    config: Config,
    gpus: str | None,
    hardware: Path | None,
    measured: Path | None,
    model_config: Path | None,
    lengths: Lengths,
    rows: int | None,
    search: bool,
    write: Path | None,
    as_json: bool,
) -> bool:
    """Print a plan; return whether the run, or with `search` any layout of it, fits."""
    spec, shape = find_spec(config.model.path, model_config)
    cluster = with_measured(find_cluster(config.cluster, gpus, hardware), measured)
    rows = rows or train_rows(config.data)
    if not search:
        plan = make_timed_plan(config, spec, cluster, rows, lengths)
        plan_view(plan, shape).show(as_json)
        return not plan.problems
    found = Search(config, spec, cluster, rows, lengths).run()
    search_view(found, cluster, shape).show(as_json)
    if write is not None and found.best:
        best = found.best[0]
        title = f"# rlhf3d plan --search on {cluster}: {best.step_s:.0f} s a step planned"
        write.write_text(f"{title}\n{config_to_yaml(best.job.config)}", encoding="utf-8")
    return bool(found.best)


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


def train_rows(data: DataConfig) -> int | None:
    """Return the number of prompts in data.train_files; None if one of those is not there.

    ValueError names a file that holds no prompts.
    """
    files = [Path(name) for name in data.train_files]
    if not files or not all(file.is_file() for file in files):
        return None
    from rlhf3d.data.parquet import open_parquet

    return sum(int(open_parquet(file, environments=True).metadata.num_rows) for file in files)
