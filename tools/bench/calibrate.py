"""Hardware numbers from runs that were timed: the ones under which the time model's phases come
closest.

Invariant: a run is described by what it wrote itself (config.yaml, metrics.jsonl); only numbers of
`FITTED` change. Pure: reads these files, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rlhf3d.config.resolve import load_run
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import ModelSpec
from rlhf3d.planning.hardware import NOT_IN_FILES, Cluster, Hardware
from rlhf3d.planning.job import Lengths, make_job
from rlhf3d.planning.plan import find_spec
from rlhf3d.planning.search.times import TimePlan, plan_time

FITTED = ("matmul_efficiency", "layer_overhead_s", "latency_s", "memory_gbs", "decode_overhead_s")
PHASES = ("generate", "old_logprobs", "ref_logprobs", "values", "update_critic", "update_actor")
"""Without sync_weights, which a canary makes several times longer in the first steps."""
PRIOR_WEIGHT = 0.01
"""How hard a number is pulled to where it was, against the squared logarithm of a whole step's
ratio."""
ROUNDS = 40


@dataclass(frozen=True)
class Observation:
    """One timed run."""

    folder: Path
    config: Config
    spec: ModelSpec
    seconds: Mapping[str, float]
    """Median of each phase that the model knows."""
    lengths: Lengths

    @property
    def step_s(self) -> float:
        """Seconds of the phases of a step."""
        return sum(self.seconds.values())


def observe(folder: Path, first_step: int = 2) -> Observation:
    """Read a run from its `first_step` on (the first one warms up). Raises ValueError where there
    is no such step, or generation ran beside training, so that phases say nothing of each other.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("step", 0) >= first_step]
    if not rows:
        raise ValueError(
            f"{folder}/metrics.jsonl has no step {first_step} or later: give a longer run"
        )
    config = load_run(folder / "config.yaml")
    if config.rollout.max_staleness:
        raise ValueError(
            f"{folder}: rollout.max_staleness = {config.rollout.max_staleness}, so that generation "
            "and training shared the machine; give a run with 0"
        )
    phases = {name for row in rows for name in row if name.startswith("timing_s/")}
    # Medians, so that one disturbed step moves nothing.
    seconds = {
        name.removeprefix("timing_s/"): median(row[name] for row in rows if name in row)
        for name in sorted(phases)
        if name.removeprefix("timing_s/") in PHASES
    }
    prompt, response = (
        median(row[f"{kind}_length/mean"] for row in rows) for kind in ("prompt", "response")
    )
    # Padded positions are what the run computed: no order of lengths has to be assumed.
    padding = median(row.get("perf/padding_share/update_actor", 0.0) for row in rows)
    spec, _ = find_spec(config.model.path)
    shared = median(row.get("perf/shared_prefix_share/update_actor", 0.0) for row in rows)
    lengths = Lengths(prompt, response, (prompt + response) * (1 - shared) / (1 - padding))
    return Observation(folder, config, spec, seconds, lengths)


def predict(seen: Observation, hardware: Hardware) -> TimePlan:
    """What the time model says of that run."""
    return plan_time(
        make_job(seen.config, seen.spec, Cluster(hardware, 1, 1), lengths=seen.lengths)
    )


def planned_step_s(seen: Observation, hardware: Hardware) -> float:
    """Planned seconds of the phases that were measured."""
    return sum(
        phase.total for phase in predict(seen, hardware).phases if phase.phase in seen.seconds
    )


def as_entry(hardware: Hardware, source: str) -> dict[str, Any]:
    """Measured hardware as an entry of a file that `load_hardware` reads."""
    entry = asdict(hardware) | {"measured": True, "source": source, "flops": dict(hardware.flops)}
    return {key: value for key, value in entry.items() if key not in NOT_IN_FILES}


def fit(hardware: Hardware, seen: Sequence[Observation]) -> Hardware:
    """`hardware` with the numbers of FITTED under which the phases come closest: coordinate descent
    on logarithms.
    """

    def moved(shifts: Mapping[str, float]) -> Hardware:
        # A shift is a factor of exp(shift): numbers stay above 0.
        return replace(
            hardware, **{name: getattr(hardware, name) * math.exp(shifts[name]) for name in FITTED}
        )

    def misfit(shifts: Mapping[str, float]) -> float:
        total = PRIOR_WEIGHT * sum(shift**2 for shift in shifts.values())
        for run in seen:
            planned = {phase.phase: phase.total for phase in predict(run, moved(shifts)).phases}
            total += sum(
                # Each phase by its share of the step; twice and half as long are equally far off.
                seconds / run.step_s * math.log(planned[name] / seconds) ** 2
                for name, seconds in run.seconds.items()
            )
        return total

    # From factors of e on; where no step helps any more, half as large ones.
    best = dict.fromkeys(FITTED, 0.0)
    value, width = misfit(best), 1.0
    for _ in range(ROUNDS):
        before = value
        for name in FITTED:
            for shift in (-width, width):
                tried = best | {name: best[name] + shift}
                if (found := misfit(tried)) < value:
                    best, value = tried, found
        if value == before:
            width /= 2
    return moved(best)
