"""A run's folder as a plain value: everything that its page shows.

Invariant: only reads; what a folder lacks is empty in the value, and what other rooms know
(configuration, plan, starts) is handed in as `RunFacts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf3d.observability.metrics import read_metrics
from rlhf3d.observability.outcome import RunRecord
from rlhf3d.observability.page.answers import (
    CHARACTERS,
    Group,
    GroupsOfStep,
    Spread,
    groups_by_step,
    prompt_pairs,
    spreads,
)
from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.page.timelines import Profile, profiles
from rlhf3d.observability.page.trajectories import Shown, trajectories
from rlhf3d.observability.page.verdict import Verdict, judge


@dataclass(frozen=True)
class Setting:
    """One key of the configuration."""

    key: str
    value: str
    default: str
    meaning: str


@dataclass(frozen=True)
class PlannedMemory:
    """Processes (on GPUs: devices) with the same needs."""

    place: str
    phase: str
    """That needs most."""
    gib: float


@dataclass(frozen=True)
class Planned:
    """What `rlhf3d plan` says of the run, for its mean lengths."""

    phases: Mapping[str, float]
    """Seconds of a step by phase."""
    step_s: float
    memory: Sequence[PlannedMemory]
    host_gib: float
    hardware: str


@dataclass(frozen=True)
class RunFacts:
    """What the metrics do not say."""

    changed: Sequence[Setting] = ()
    """Keys that differ from their defaults."""
    config: str = ""
    """All of it, as YAML."""
    config_problem: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    starts: Sequence[tuple[int, str]] = ()
    """The step after which each part of the run began (0: the start), and when."""
    record: RunRecord | None = None
    """How many steps it is to make, and how it ended; None where that is not known."""
    setup: Setup | None = None
    """None where the configuration is not known."""
    plan: Planned | None = None
    plan_problem: str = ""
    """Why there is none."""

    @property
    def resumes(self) -> list[int]:
        """The steps after which the run went on from a checkpoint."""
        return [step for step, _ in self.starts if step > 0]


@dataclass(frozen=True)
class RunView:
    """One run."""

    name: str
    folder: str
    rows: Sequence[Mapping[str, Any]]
    verdict: Verdict
    facts: RunFacts
    pair_steps: tuple[int, int]
    pairs: Sequence[Group]
    groups: Sequence[GroupsOfStep]
    spreads: Mapping[str, Spread]
    trajectories: Sequence[Shown]
    profiles: Sequence[Profile] = ()


def names_of(runs: Iterable[Path]) -> dict[Path, str]:
    """A name for each run; one that is given twice counts once."""
    found = {run.resolve(): run for run in runs}
    names = {run: resolved.name for resolved, run in found.items()}
    if len(set(names.values())) < len(names):
        # Runs of the same name: tell them apart by their complete paths.
        return {run: str(resolved) for resolved, run in found.items()}
    return names


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The run's metrics. ValueError for a folder that is none, or before the first step."""
    rows = read_metrics(run)
    if not rows:
        raise ValueError(f"{run} has no finished step yet: report it after the first")
    return rows


def collect(
    run: Path, name: str, rows: Sequence[Mapping[str, Any]], facts: RunFacts, runs: int = 1
) -> RunView:
    """Read what a run wrote; `runs`: how many share the page, and the room for texts."""
    steps, pairs = prompt_pairs(run, CHARACTERS // 4 // runs)
    return RunView(
        name=name,
        folder=str(run),
        rows=rows,
        verdict=judge(rows, facts.setup),
        facts=facts,
        pair_steps=steps,
        pairs=pairs,
        groups=groups_by_step(run, CHARACTERS // 2 // runs),
        spreads=spreads(run),
        trajectories=trajectories(run),
        profiles=profiles(run, runs),
    )
