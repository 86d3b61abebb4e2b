"""`rlhf3d plan`: a plan or a search on the screen, as JSON, or as a configuration.

Invariant: starts nothing, and writes only the file it is told to.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import Config
from rlhf3d.planning import search_view, view
from rlhf3d.planning.job import Lengths
from rlhf3d.planning.measured import with_measured
from rlhf3d.planning.plan import find_cluster, find_spec, make_plan, train_rows
from rlhf3d.planning.search import Search
from rlhf3d.terminal import Terminal


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
    """Print; whether the run, or with `search` any layout of it, fits."""
    spec, shape = find_spec(config, model_config)
    cluster = with_measured(find_cluster(config, gpus, hardware), measured)
    rows = rows or train_rows(config)
    if not search:
        plan = make_plan(config, spec, cluster, rows, lengths)
        _print(json.dumps(view.as_json(plan)) if as_json else view.render(plan, shape))
        return not plan.problems
    found = Search(config, spec, cluster, rows, lengths).run()
    _print(
        json.dumps(search_view.as_json(found))
        if as_json
        else search_view.render(found, cluster, shape)
    )
    if write is not None and found.best:
        best = found.best[0]
        title = f"# rlhf3d plan --search on {cluster}: {best.step_s:.0f} s a step planned"
        write.write_text(f"{title}\n{config_to_yaml(best.job.config)}", encoding="utf-8")
    return bool(found.best)


def _print(shown: object) -> None:
    """Text as it is, tables as wide as the terminal."""
    if isinstance(shown, str):
        print(shown)
    else:
        Terminal(soft_wrap=False).print(shown)
