"""Profiles of steps: what every process did, written to `RUN/profile/`.

Invariant: a profile changes nothing that is computed, and one that fails ends no run. The recorders
of all processes begin before the driver's, whose begin is time 0.
Runs in: driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf3d.config.schema import TrainerConfig
from rlhf3d.observability.console import Console, reported_only
from rlhf3d.observability.profile.clock import (
    SAME,
    Offset,
    RoundTrip,
    offset_of,
    this_machine,
)
from rlhf3d.observability.profile.operations import OperationsSettings
from rlhf3d.observability.profile.recorder import start_recording, take_record
from rlhf3d.observability.profile.spans import Record
from rlhf3d.observability.profile.timeline import (
    Lane,
    Process,
    folder_of,
    merge,
    write_timeline,
)
from rlhf3d.placement.calls import start_call
from rlhf3d.placement.engine_rank import EngineRank
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.waiting import gather
from rlhf3d.placement.worker import TrainWorker

TRIPS = 8
"""Questions for the time of another machine, of which the one with the quickest answer counts."""
PHASE = "profile"


@dataclass(frozen=True)
class _Recorded:
    """A process, and its methods of a profile."""

    process: Process
    actor: Any
    start: Callable[[Any, OperationsSettings | None], str]
    clock_ns: Callable[[Any], int]
    take: Callable[[Any, int], Record | None]


@dataclass(frozen=True)
class Recorders:
    """The processes of a run beside the driver, as far as they can be recorded."""

    groups: Sequence[TrainGroup]
    rollout: RolloutGroup
    timeout_s: float
    operations_s: float = 0.0
    """Of each phase in which torch's operations are traced."""

    def start(self, folder: Path) -> dict[str, Offset]:
        """Begin to record everywhere; the clocks of processes on other machines, by name."""
        found = self._all()
        calls = {}
        for name, one in found.items():
            traced = OperationsSettings(str(folder.absolute()), one.process.name, self.operations_s)
            wanted = traced if self.operations_s else None
            calls[name] = start_call(one.actor, one.start, wanted)
        machines = dict(zip(calls, gather(PHASE, calls, self.timeout_s), strict=True))
        of_machine = {this_machine(): SAME}
        for name, machine in machines.items():
            if machine not in of_machine:
                trips = [self._ask(name, found[name]) for _ in range(TRIPS)]
                of_machine[machine] = offset_of(trips)
        return {name: of_machine[machine] for name, machine in machines.items()}

    def _ask(self, name: str, one: _Recorded) -> RoundTrip:
        sent = time.monotonic_ns()
        calls = {name: start_call(one.actor, one.clock_ns)}
        answer = gather(PHASE, calls, self.timeout_s)[0]
        return RoundTrip(sent, answer, time.monotonic_ns())

    def take(self, began: int, offsets: Mapping[str, Offset]) -> list[Lane]:
        """End the recordings; those of processes that were not started since `began`."""
        found = {name: one for name, one in self._all().items() if name in offsets}
        calls = {
            name: start_call(one.actor, one.take, began + offsets[name].ns)
            for name, one in found.items()
        }
        records = dict(zip(calls, gather(PHASE, calls, self.timeout_s), strict=True))
        return [
            Lane(found[name].process, record, offsets[name])
            for name, record in records.items()
            if record is not None
        ]

    def _all(self) -> dict[str, _Recorded]:
        """By name; engines may have been started again."""
        found = {}
        for group in self.groups:
            train = (TrainWorker.start_profile, TrainWorker.clock_ns, TrainWorker.take_profile)
            for name, (process, actor) in _ranks(group).items():
                found[name] = _Recorded(process, actor, *train)
        engine = (EngineRank.start_profile, EngineRank.clock_ns, EngineRank.take_profile)
        for handle in self.rollout.engines:
            for name, actor in handle.ranks():
                found[name] = _Recorded(Process(name, "engine"), actor, *engine)
        return found


def _ranks(group: TrainGroup) -> dict[str, tuple[Process, Any]]:
    """A group's processes and actors by name; the stages of a pipeline stand together."""
    layout, found = group.layout, []
    for rank, (name, actor) in enumerate(group.ranks().items()):
        at = layout.coords(rank)
        context = f" cp{at.cp}" if layout.cp > 1 else ""
        short = f"{group.name} tp{at.tp} pp{at.pp} dp{at.dp}{context}"
        process = Process(short, group.name, at.pp, layout.pp, layout.vpp or 1)
        found.append(((at.dp, at.cp, at.tp, at.pp), name, (process, actor)))
    return {name: one for _, name, one in sorted(found, key=lambda item: item[0])}


@dataclass
class Profiler:
    """Profiles the steps it is told to."""

    steps: Collection[int] = ()
    folder: Path = field(default_factory=Path)
    recorders: Recorders | None = None
    """None where no step is profiled."""
    console: Console = field(default_factory=Console)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the body where it is such a step."""
        if step not in self.steps or self.recorders is None:
            yield
            return
        recorders, offsets = self.recorders, dict[str, Offset]()
        folder = folder_of(self.folder, step)
        what, then = f"step {step} is not profiled", "the run goes on"
        with reported_only(self.console, what, then):
            offsets = recorders.start(folder)
        began = time.monotonic_ns()
        start_recording()
        try:
            yield
        finally:
            ended, own = time.monotonic_ns(), take_record()
        assert own is not None, "the driver records since the step began"
        if not offsets:  # nobody records
            return
        with reported_only(self.console, what, then):
            lanes = [Lane(Process("driver", "driver"), own), *recorders.take(began, offsets)]
            path = write_timeline(self.folder, merge(step, began, ended, lanes))
            self.console.note(f"the profile of step {step} is in {path} (https://ui.perfetto.dev)")


def make_profiler(
    trainer: TrainerConfig,
    groups: Mapping[str, TrainGroup],
    rollout: RolloutGroup,
    console: Console,
) -> Profiler:
    """For a run; `groups`: by role, several of which may share one."""
    each = list({id(group): group for group in groups.values()}.values())
    recorders = Recorders(each, rollout, rollout.timeout_s, trainer.profile_operations_s)
    return Profiler(trainer.profile_steps, Path(trainer.output_dir), recorders, console)
