"""`rlhf3d plan`: a plan or a search on the screen, as JSON, or as a configuration.

Invariant: starts nothing, and writes only the file that --write names.
"""

from __future__ import annotations

from pathlib import Path

from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import Config, DataConfig
from rlhf3d.planning.job import Lengths
from rlhf3d.planning.measured import with_measured
from rlhf3d.planning.plan import find_cluster, find_spec, make_plan
from rlhf3d.planning.search.plan import with_time
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
        plan = with_time(make_plan(config, spec, cluster, rows, lengths))
        plan_view(plan, shape).show(as_json)
        return not plan.problems
    found = Search(config, spec, cluster, rows, lengths).run()
    search_view(found, cluster, shape).show(as_json)
    if write is not None and found.best:
        best = found.best[0]
        title = f"# rlhf3d plan --search on {cluster}: {best.step_s:.0f} s a step planned"
        write.write_text(f"{title}\n{config_to_yaml(best.job.config)}", encoding="utf-8")
    return bool(found.best)


def train_rows(data: DataConfig) -> int | None:
    """Return the number of prompts in data.train_files; None if one of those is not there.

    ValueError names a file that holds no prompts.
    """
    files = [Path(name) for name in data.train_files]
    if not files or not all(file.is_file() for file in files):
        return None
    from rlhf3d.data.parquet import open_parquet

    return sum(int(open_parquet(file, environments=True).metadata.num_rows) for file in files)
