"""A plan with the time of a step: `Plan` and what the time model says of the same job.

Invariant: as `rlhf3d.planning.plan`; the memory decides whether a step has a time at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf3d.config.schema import Config
from rlhf3d.models.spec import ModelSpec
from rlhf3d.planning.hardware import Cluster
from rlhf3d.planning.job import Lengths
from rlhf3d.planning.plan import Plan, make_plan
from rlhf3d.planning.search.times import TimePlan, plan_time


@dataclass(frozen=True)
class TimedPlan(Plan):
    """The memory of a job, and the time of its steps."""

    time: TimePlan | None
    """None where the engines cannot start."""

    @property
    def step_s(self) -> float:
        """Seconds of a step; infinite where there is none."""
        return math.inf if self.time is None else self.time.step_s


def make_timed_plan(
    config: Config,
    spec: ModelSpec,
    cluster: Cluster,
    rows: int | None = None,
    lengths: Lengths | None = None,
) -> TimedPlan:
    """Plan memory and time of a checked configuration; `rows` of training data for a run in epochs.

    Raises ValueError where model and layout do not fit each other.
    """
    plan = make_plan(config, spec, cluster, rows, lengths)
    time = None if plan.memory.engine.missing else plan_time(plan.job)
    return TimedPlan(plan.job, plan.memory, time)
