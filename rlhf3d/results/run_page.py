"""The page of runs, with what other rooms know of them: configuration, plan, starts.

Invariant: nothing of the user's is executed, and what cannot be found out is said on the page, with
the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rlhf3d.checkpoints.resume import flat_config
from rlhf3d.checkpoints.store import CONFIG_FILE
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import load_config
from rlhf3d.config.schema import Config
from rlhf3d.observability.metrics import Rows
from rlhf3d.observability.outcome import read_record
from rlhf3d.observability.page.collect import (
    Planned,
    PlannedMemory,
    RunFacts,
    RunView,
    Setting,
    collect,
    names_of,
    read_rows,
)
from rlhf3d.observability.page.render import render
from rlhf3d.observability.page.trends import mean_of, recent, training_rows
from rlhf3d.placement.journal import beginnings
from rlhf3d.planning.job import mean_lengths
from rlhf3d.planning.measured import with_measured
from rlhf3d.planning.of_run import plannable
from rlhf3d.planning.plan import find_cluster, find_spec, make_plan
from rlhf3d.planning.search.plan import with_time
from rlhf3d.results.run_setup import setup_of
from rlhf3d.units import GIB

PAGE_FILE = "report.html"


def write_page(runs: Sequence[Path], output: Path) -> Path:
    """Write the page of the runs; returns it. ValueError for a folder that is no run's."""
    views = view_all([(run, read_rows(run)) for run in names_of(runs)])
    output.parent.mkdir(parents=True, exist_ok=True)
    # UTF-8 cannot hold half a surrogate pair, which a completion may have.
    output.write_text(render(views), encoding="utf-8", errors="backslashreplace")
    return output


def view_all(found: Sequence[tuple[Path, Rows]]) -> list[RunView]:
    """The runs of one page, each with its rows."""
    names = names_of(run for run, _ in found)
    return [collect(run, names[run], rows, run_facts(run, rows), len(found)) for run, rows in found]


def run_facts(run: Path, rows: Rows) -> RunFacts:
    """What is known of a run besides its metrics and samples."""
    began = beginnings(run)
    versions: Mapping[str, str] = began[-1].facts.get("versions", {}) if began else {}
    starts = [(part.begin, _when(part.facts.get("started"))) for part in began]
    record, path = read_record(run), run / CONFIG_FILE
    if not path.is_file():
        problem = f"The folder has no {CONFIG_FILE}."
        return RunFacts((), "", problem, versions, starts, record, plan_problem=problem)
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_config(path)
    except ValueError as error:
        problem = f"{CONFIG_FILE} cannot be used by this version: {error}"
        return RunFacts((), text, problem, versions, starts, record, plan_problem=problem)
    settings = changed(flat_config(config))
    facts = RunFacts(settings, text, "", versions, starts, record, setup_of(path))
    try:
        return replace(facts, plan=planned(path, rows))
    except (ValueError, OSError) as error:
        return replace(facts, plan_problem=str(error))


def _when(started: str | None) -> str:
    """A time as a journal has it, with its machine's offset from UTC; empty where it has none."""
    if started is None:
        return ""
    date, time = started[:10], started[11:19]
    return f"{date} {time} UTC{started[19:]}"


def changed(values: Mapping[str, Any]) -> list[Setting]:
    """Keys with another value than their default, in the order of the schema.

    `values`: of the run, by dotted key, as a file has them.
    """
    defaults = flat_config(Config())
    found = []
    for key in all_keys():
        name = key.name
        if name in values and values[name] != defaults.get(name):
            meaning = " ".join(key.doc.split())
            default = _shown(defaults.get(name))
            found.append(Setting(name, _shown(values[name]), default, meaning))
    return found


def _shown(value: Any) -> str:
    """As a file would have it, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def planned(file: Path, rows: Rows) -> Planned:
    """The plan of the configuration in a file, for the lengths that its run has.

    ValueError where there can be none.
    """
    config = plannable(file)
    spec, _ = find_spec(config.model.path)
    cluster = with_measured(find_cluster(config.cluster, None), None)
    last = recent(training_rows(rows))
    prompt, response = (mean_of(last, f"{part}_length/mean") for part in ("prompt", "response"))
    turns = mean_of(last, "num_turns/mean") if config.environment.enabled else None
    # What the last steps do not say is the plan's own guess.
    lengths = mean_lengths(config.data, config.environment, prompt, response, turns)
    plan = with_time(make_plan(config, spec, cluster, lengths=lengths))
    if plan.time is None:
        raise ValueError("; ".join(plan.problems))
    memory = [
        PlannedMemory(_place(rank.ranks, rank.place), rank.peak.phase, rank.peak.total / GIB)
        for rank in plan.memory.ranks
    ]
    seconds = {phase.phase: phase.total for phase in plan.time.phases}
    host_gib = plan.memory.host.total / GIB
    return Planned(seconds, plan.time.step_s, memory, host_gib, str(cluster).removeprefix("1 x "))


def _place(ranks: Sequence[int], place: str) -> str:
    numbers = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{numbers}: {place}"
