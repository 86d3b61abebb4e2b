"""A plan with the time of a step: `Plan` and what the time model says of the same job.

Invariant: as `rlhf3d.planning.plan`; the memory decides whether a step has a time at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf3d.planning.plan import Plan
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


def with_time(plan: Plan) -> TimedPlan:
    """A plan of memory with that of time."""
    time = None if plan.memory.engine.missing else plan_time(plan.job)
    return TimedPlan(plan.job, plan.memory, time)
