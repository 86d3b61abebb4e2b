"""Layouts and placements of a run on so many GPUs, ranked by the planned time of a step.

Invariant: legal is what the run itself accepts, fitting and fast what the planner says of the whole configuration.
Engines are chosen after training, as all that couples the two is the memory that training leaves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from rlhf3d.config.checks import check
from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config, LayoutConfig, RolloutConfig
from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.layout import Recompute
from rlhf3d.parallel.platform import CUDAPlatform
from rlhf3d.planning.engines import engine_memory
from rlhf3d.planning.hardware import Cluster
from rlhf3d.planning.job import Job, Lengths, make_job
from rlhf3d.planning.memory import spare, training_memory
from rlhf3d.planning.search.plan import TimedPlan, make_timed_plan
from rlhf3d.planning.search.space import (
    batchings,
    engine_shares,
    engine_sizes,
    layouts,
    longest_sequence,
    on_cluster,
    rests,
)
from rlhf3d.planning.search.times import (
    forward_time,
    generate_time,
    save_time,
    sync_time,
    update_time,
)
from rlhf3d.units import GIB

APART_UTILIZATION = 0.9
"""rollout.gpu_memory_utilization of engines on devices of their own."""
STEP = 0.05
"""Beside training it is tried in steps of this, leaving at least as much of the device free as one in four of them."""
SHOWN = 5
CRITICS = 2
"""So many of the fastest are tried with a critic in a layout of its own."""
WORTHWHILE = 0.005
"""Share of a step that it must save."""


class Option(NamedTuple):
    """A configuration and the seconds of its step."""

    seconds: float
    excess: float
    """Bytes that the fullest device lacks; 0 or less where it fits."""
    config: Config

    @property
    def kind(self) -> tuple[str, int, LayoutConfig, bool]:
        """What distinguishes it from others worth showing: of each layout one is enough."""
        rollout, layout = self.config.rollout, self.config.actor.layout
        return (
            rollout.placement,
            rollout.engines,
            replace(layout, recompute="none"),
            self.config.critic.layout is None,
        )


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    best: tuple[TimedPlan, ...]
    """Those that fit, fastest first."""
    near: tuple[TimedPlan, ...]
    """Those that do not fit and would be faster than the best: of each layout the one that lacks least, least first."""
    counts: Counter[str]
    """Of configurations: fit, do not fit, refused."""


@dataclass(frozen=True)
class Search:
    """A search around a configuration, whose batch, algorithm and lengths stay."""

    config: Config
    spec: ModelSpec
    cluster: Cluster
    rows: int | None
    lengths: Lengths
    generate_s: dict[RolloutConfig, float] = field(default_factory=dict)
    """Seconds of the phase by engines: training does not change them."""

    def __post_init__(self) -> None:
        if self.cluster.hardware.memory_gib is None:
            raise ValueError("--search plans for GPUs: give --gpus, such as --gpus 8xH100")

    @property
    def limit(self) -> float:
        """Bytes of a device."""
        return (self.cluster.hardware.memory_gib or 0.0) * GIB

    def run(self) -> Found:
        """Look at everything."""
        counts: Counter[str] = Counter()
        fitting: list[Option] = []
        too_big: list[Option] = []
        base = resolve_platform(on_cluster(self.config, self.cluster), CUDAPlatform(reason="plan"))
        for apart in engine_shares(self.cluster):
            allowed = self._layouts(self.cluster.devices - apart)
            for resting in rests(base, apart):
                engines = self._engines(resting, apart)
                for config in (
                    config for layout in allowed for config in batchings(resting, layout)
                ):
                    if check(replace(config, rollout=engines[0][1])):
                        counts["refused"] += 1
                        continue
                    fit, small = self._with_engines(config, engines)
                    counts["fit" if fit else "do not fit"] += 1
                    (fitting if fit else too_big).append(fit or small)
        fitting.sort(key=lambda option: option.seconds)
        if self.config.needs_critic:
            fitting += [
                better for option in fitting[:CRITICS] if (better := self._critic_apart(option))
            ]
        best = self._plans(sorted(fitting, key=lambda option: option.seconds), fits=True)
        fastest = best[0].step_s if best else math.inf
        near = [
            option
            for option in sorted(too_big, key=lambda option: option.excess)
            if option.seconds <= fastest
        ]
        return Found(best, self._plans(near, fits=False), counts)

    def _layouts(self, devices: int) -> list[LayoutConfig]:
        return layouts(
            self.spec, devices, self.cluster.devices_per_node, longest_sequence(self.config)
        )

    def _engines(self, config: Config, apart: int) -> list[tuple[float, RolloutConfig]]:
        """Engines that use the devices, (utilization they need at least, settings)."""
        ranks, found = apart or self.cluster.devices, []
        rollout = config.rollout
        # The ranks of an engine beside training share a node; FP8 is for engines of one rank.
        most = (
            self.cluster.devices_per_node * (2 if apart else 1)
            if rollout.quantization == "none"
            else 1
        )
        for tp in engine_sizes(self.spec, ranks, most, rollout.expert_parallel):
            settings = replace(
                rollout,
                placement="disaggregated" if apart else "colocated",
                engines=ranks // tp,
                tensor_parallel_size=tp,
                gpu_memory_utilization=APART_UTILIZATION,
            )
            memory = engine_memory(
                make_job(replace(config, rollout=settings), self.spec, self.cluster)
            )
            least = (memory.weights + memory.activations + memory.one_sequence) / self.limit
            found.append((math.ceil(least / STEP) * STEP, settings))
        return found

    def _with_engines(
        self, config: Config, engines: Sequence[tuple[float, RolloutConfig]]
    ) -> tuple[Option | None, Option]:
        """With the fastest engines that the memory left by training allows, and with the smallest ones."""
        job = make_job(
            replace(config, rollout=engines[0][1]), self.spec, self.cluster, lengths=self.lengths
        )
        training, peak = training_seconds(job), self._training_peak(job)
        free = 1 - peak / self.limit
        fitting = []
        for least, rollout in engines:
            colocated = rollout.placement == "colocated"
            most = (
                math.floor((free - STEP / 4) / STEP) * STEP
                if colocated
                else APART_UTILIZATION * (free >= 0)
            )
            if least <= min(most, APART_UTILIZATION):
                share = min(most, APART_UTILIZATION)
                fitting.append(self._option(job, rollout, share, training, 0.0))
        least, rollout = min(engines, key=lambda engine: engine[0])
        beside = min(least, 1.0) if rollout.placement == "colocated" else 0.0
        excess = peak - (1 - beside) * self.limit
        smallest = self._option(job, rollout, beside or APART_UTILIZATION, training, excess)
        return min(fitting, key=lambda option: option.seconds, default=None), smallest

    def _critic_apart(self, option: Option) -> Option | None:
        """The same with the critic in processes of its own on the actor's devices, where that is faster and fits."""
        best, devices = option, parallel_layout(option.config.actor.layout).world_size
        for layout in self._layouts(devices):
            for recompute in get_args(Recompute):
                own = replace(
                    option.config.critic,
                    layout=replace(layout, recompute=recompute),
                    placement="colocated",
                )
                config = replace(option.config, critic=own)
                if check(config):
                    continue
                job, rollout = (
                    make_job(config, self.spec, self.cluster, lengths=self.lengths),
                    config.rollout,
                )
                beside = rollout.gpu_memory_utilization * (rollout.placement == "colocated")
                if self._training_peak(job) <= (1 - beside) * self.limit:
                    tried = self._option(
                        job, rollout, rollout.gpu_memory_utilization, training_seconds(job), 0.0
                    )
                    best = tried if tried.seconds < (1 - WORTHWHILE) * best.seconds else best
        return None if best is option else best

    def _option(
        self, job: Job, rollout: RolloutConfig, share: float, training_s: float, excess: float
    ) -> Option:
        """The job with these engines; `training_s` is what its passes and updates take."""
        rollout = replace(rollout, gpu_memory_utilization=round(share, 2))
        config = replace(job.config, rollout=rollout)
        job = replace(job, config=config)
        if rollout not in self.generate_s:
            serves = not engine_memory(job).missing
            self.generate_s[rollout] = generate_time(job).total if serves else math.inf
        return Option(training_s + self.generate_s[rollout] + sync_time(job).total, excess, config)

    def _training_peak(self, job: Job) -> int:
        """Bytes of the fullest training device with its margin, but without an engine that stays awake."""
        training = training_memory(job, engine_memory(job), ends=True)
        sleeps = job.config.rollout.sleep and job.colocated
        beside = ("generate", "sync_weights")
        return max(
            int(phase.total - phase.terms.get("vLLM", 0) + spare(self.limit, phase))
            for rank in training
            for phase in rank.phases
            if not sleeps or phase.phase in beside or phase.total > self.limit
        )

    def _plans(self, options: Sequence[Option], fits: bool) -> tuple[TimedPlan, ...]:
        """The first of so many layouts, planned whole."""
        found: list[TimedPlan] = []
        kinds = set()
        for option in options:
            if option.kind in kinds:
                continue
            plan = make_timed_plan(option.config, self.spec, self.cluster, self.rows, self.lengths)
            if fits == (plan.verdict == "fits"):
                found.append(plan)
                kinds.add(option.kind)
            if len(found) == SHOWN:
                break
        return tuple(sorted(found, key=lambda plan: plan.step_s) if fits else found)


def training_seconds(job: Job) -> float:
    """Seconds of what does not depend on the engines: all passes, updates, and the share of a save."""
    seconds = sum(forward_time(job, model).total for model in job.models)
    seconds += sum(update_time(job, model).total for model in job.models if model.trained)
    return seconds + (save_time(job).total if job.config.trainer.save_freq else 0.0)
