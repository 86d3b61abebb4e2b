"""Layouts and placements of a run on a number of GPUs, ranked by the planned time of a step.

Invariant: legal is what the run itself accepts, fitting and fast what the planner says of the
complete configuration. Engines are chosen after training, as all that couples the two is the memory
that training leaves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
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
from rlhf3d.planning.plan import make_plan
from rlhf3d.planning.search.generation import generate_time
from rlhf3d.planning.search.phase_time import PhaseTime
from rlhf3d.planning.search.plan import TimedPlan, with_time
from rlhf3d.planning.search.schedule import Schedule, make_schedule
from rlhf3d.planning.search.space import (
    batch_sizes,
    dedicated_counts,
    engine_sizes,
    layouts,
    longest_sequence,
    on_cluster,
    residences,
)
from rlhf3d.planning.search.times import sync_time, training_phases
from rlhf3d.units import GIB

DEDICATED_UTILIZATION = 0.9
"""rollout.gpu_memory_utilization of engines on devices of their own."""
UTILIZATION_STEP = 0.05
"""Of colocated engines it is tried in these steps; a quarter of one is left free at least."""
SHOWN = 5
CRITICS = 2
"""The N fastest are tried with a critic in a layout of its own."""
WORTHWHILE = 0.005
"""Share of a step that such a critic must save."""


class Option(NamedTuple):
    """A configuration and the time of its step."""

    schedule: Schedule
    excess: float
    """Bytes that the fullest device lacks; 0 or less where it fits."""
    config: Config

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.schedule.step_s

    @property
    def dedicated(self) -> int:
        """Devices that engines have to themselves; 0 where they share those that train."""
        rollout = self.config.rollout
        if rollout.placement == "colocated":
            return 0
        return rollout.engines * rollout.tensor_parallel_size

    @property
    def kind(self) -> tuple[str, int, LayoutConfig, bool]:
        """The key by which options differ enough to show both."""
        rollout, layout = self.config.rollout, self.config.actor.layout
        own_critic = self.config.critic.layout is not None
        return rollout.placement, rollout.engines, replace(layout, recompute="none"), own_critic


class Split(NamedTuple):
    """A way to share the devices out between training and engines."""

    dedicated: int
    """Devices that engines have to themselves; 0 where they share those that train."""
    training: int
    """Devices that train."""
    schedule: Schedule | None
    """Of the fastest configuration; None where none fits."""


class Engines(NamedTuple):
    """Engines that use all devices they may."""

    least: float
    """The gpu_memory_utilization that they need at least."""
    rollout: RolloutConfig


@dataclass(frozen=True)
class Found:
    """The results of a search."""

    best: tuple[TimedPlan, ...]
    """Plans that fit, fastest first."""
    near: tuple[TimedPlan, ...]
    """Plans that do not fit and would be faster: of each layout the one that lacks least."""
    counts: Counter[str]
    """Of configurations: fit, do not fit, refused."""
    splits: tuple[Split, ...]
    """Each way to share the devices out between training and engines, with few engines first."""


@dataclass(frozen=True)
class Search:
    """A search around a configuration, whose batch, algorithm and lengths stay."""

    config: Config
    spec: ModelSpec
    cluster: Cluster
    rows: int | None
    lengths: Lengths
    generated: dict[RolloutConfig, PhaseTime] = field(default_factory=dict)
    """The phase by engines: training does not change it."""

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
        for config, engines in self._candidates():
            config = replace(config, rollout=engines[0].rollout)
            if check(config):
                counts["refused"] += 1
                continue
            job = make_job(config, self.spec, self.cluster, lengths=self.lengths)
            fits, smallest = self._with_engines(job, engines)
            if fits is None:
                too_big.append(smallest)
            else:
                fitting.append(fits)
        counts["fit"], counts["do not fit"] = len(fitting), len(too_big)
        fitting.sort(key=lambda option: option.seconds)
        # A layout of its own multiplies the search, so it is tried for the best alone.
        if self.config.needs_critic:
            better = [self._with_own_critic(option) for option in fitting[:CRITICS]]
            fitting += [option for option in better if option is not None]
            fitting.sort(key=lambda option: option.seconds)
        best = self._plans(fitting, fits=True)
        fastest = best[0].step_s if best else math.inf
        too_big.sort(key=lambda option: option.excess)
        # Slower than the best plan that fits, they are of no interest.
        near = [option for option in too_big if option.seconds <= fastest]
        # The plus drops counts of 0.
        return Found(best, self._plans(near, fits=False), +counts, self._splits(fitting))

    def _splits(self, fitting: Sequence[Option]) -> tuple[Split, ...]:
        """The fastest of each split, from options in the order of their seconds."""
        found = []
        for dedicated in dedicated_counts(self.cluster, self.config.rollout):
            options = (option for option in fitting if option.dedicated == dedicated)
            fastest = next(options, None)
            schedule = None if fastest is None else fastest.schedule
            found.append(Split(dedicated, self.cluster.devices - dedicated, schedule))
        return tuple(found)

    def _candidates(self) -> Iterator[tuple[Config, list[Engines]]]:
        """Every configuration of training, and the engines it may go with."""
        platform = CUDAPlatform(reason="plan")
        nodes = on_cluster(self.config.cluster, self.cluster)
        base = resolve_platform(replace(self.config, cluster=nodes), platform)
        longest = longest_sequence(base.data)
        for dedicated in dedicated_counts(self.cluster, self.config.rollout):
            allowed = self._layouts(self.cluster.devices - dedicated)
            for model, rollout in residences(base.model, base.rollout, dedicated):
                resident = replace(base, model=model, rollout=rollout)
                engines = self._engines(resident, dedicated)
                for layout in allowed:
                    for actor, critic in batch_sizes(base.actor, base.critic, layout, longest):
                        yield replace(resident, actor=actor, critic=critic), engines

    def _layouts(self, devices: int) -> list[LayoutConfig]:
        per_node = self.cluster.devices_per_node
        return layouts(self.spec, devices, per_node, longest_sequence(self.config.data))

    def _engines(self, config: Config, dedicated: int) -> list[Engines]:
        ranks, rollout = dedicated or self.cluster.devices, config.rollout
        # The ranks of an engine share a node; FP8 is for engines of one rank.
        most = self.cluster.devices_per_node
        if rollout.quantization != "none":
            most = 1
        found = []
        for tp in engine_sizes(self.spec, ranks, most, rollout.expert_parallel):
            settings = replace(
                rollout,
                placement="disaggregated" if dedicated else "colocated",
                engines=ranks // tp,
                tensor_parallel_size=tp,
                gpu_memory_utilization=DEDICATED_UTILIZATION,
            )
            job = make_job(replace(config, rollout=settings), self.spec, self.cluster)
            memory = engine_memory(job)
            least = (memory.weights + memory.activations + memory.one_sequence) / self.limit
            # Rounded up to the steps in which shares are tried.
            found.append(Engines(math.ceil(least / UTILIZATION_STEP) * UTILIZATION_STEP, settings))
        return found

    def _with_engines(self, job: Job, engines: Sequence[Engines]) -> tuple[Option | None, Option]:
        """With the fastest engines for which training leaves the memory, and with the smallest."""
        training, peak = training_phases(job), self._training_peak(job)
        free = 1 - peak / self.limit
        fitting = []
        for least, rollout in engines:
            # Engines on devices of their own leave training alone, which must fit by itself.
            share = DEDICATED_UTILIZATION if free >= 0 else 0.0
            if rollout.placement == "colocated":
                steps = math.floor((free - UTILIZATION_STEP / 4) / UTILIZATION_STEP)
                share = min(steps * UTILIZATION_STEP, DEDICATED_UTILIZATION)
            if least <= share:
                fitting.append(self._option(job, rollout, share, training, excess=0.0))
        least, rollout = min(engines, key=lambda each: each.least)
        # What does not fit is shown with the smallest engines, which lack least.
        colocated_share = min(least, 1.0) if rollout.placement == "colocated" else 0.0
        excess = peak - (1 - colocated_share) * self.limit
        share = colocated_share or DEDICATED_UTILIZATION
        smallest = self._option(job, rollout, share, training, excess)
        return min(fitting, key=lambda option: option.seconds, default=None), smallest

    def _with_own_critic(self, option: Option) -> Option | None:
        """The same with the critic in processes of its own on the actor's devices.

        None where that does not fit or is not faster.
        """
        best, devices = option, parallel_layout(option.config.actor.layout).world_size
        for layout, recompute in product(self._layouts(devices), get_args(Recompute)):
            layout = replace(layout, recompute=recompute)
            critic = replace(option.config.critic, layout=layout, placement="colocated")
            config = replace(option.config, critic=critic)
            if check(config):
                continue
            job = make_job(config, self.spec, self.cluster, lengths=self.lengths)
            rollout = config.rollout
            share = rollout.gpu_memory_utilization
            engine_share = share if rollout.placement == "colocated" else 0.0
            if self._training_peak(job) <= (1 - engine_share) * self.limit:
                tried = self._option(job, rollout, share, training_phases(job), excess=0.0)
                if tried.seconds < (1 - WORTHWHILE) * best.seconds:
                    best = tried
        return None if best is option else best

    def _option(
        self,
        job: Job,
        rollout: RolloutConfig,
        share: float,
        training: Sequence[PhaseTime],
        excess: float,
    ) -> Option:
        """The job with these engines; `training` is what its passes and updates take."""
        rollout = replace(rollout, gpu_memory_utilization=round(share, 2))
        config = replace(job.config, rollout=rollout)
        job = replace(job, config=config)
        if rollout not in self.generated:
            # Without room for one sequence vLLM does not start, so there is no time.
            starts = not engine_memory(job).missing
            never = PhaseTime("generate", {"never": math.inf})
            self.generated[rollout] = generate_time(job) if starts else never
        phases = [*training, self.generated[rollout], sync_time(job)]
        return Option(make_schedule(job, phases), excess, config)

    def _training_peak(self, job: Job) -> int:
        """Bytes of the fullest training device with its margin, without an engine that is awake."""
        sleeps = job.config.rollout.sleep and job.colocated
        most = 0
        for rank in training_memory(job, engine_memory(job), ends=True):
            for phase in rank.phases:
                # Beside an engine that sleeps, only these phases share the device with it.
                shared = not sleeps or phase.phase in ("generate", "sync_weights")
                if shared or phase.total > self.limit:
                    own = phase.total - phase.terms.get("vLLM", 0)
                    most = max(most, int(own + spare(self.limit, phase)))
        return most

    def _plans(self, options: Sequence[Option], fits: bool) -> tuple[TimedPlan, ...]:
        """Complete plans of the first options, at most SHOWN, each of another kind."""
        found: list[TimedPlan] = []
        kinds = set()
        for option in options:
            if option.kind in kinds:
                continue
            # The search's own sums rank options; whether one fits, the complete plan decides.
            plan = with_time(
                make_plan(option.config, self.spec, self.cluster, self.rows, self.lengths)
            )
            if fits == (plan.verdict == "fits"):
                found.append(plan)
                kinds.add(option.kind)
            if len(found) == SHOWN:
                break
        if fits:
            found.sort(key=lambda plan: plan.step_s)
        return tuple(found)
