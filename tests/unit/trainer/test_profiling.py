"""The driver's side of a profile: one clock for all, and no run that a profile ends."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf3d.observability.console import Console
from rlhf3d.observability.profile.clock import this_machine
from rlhf3d.observability.profile.operations import OperationsSettings
from rlhf3d.observability.profile.recorder import recorder, span, take_record
from rlhf3d.observability.profile.spans import Record, Span
from rlhf3d.observability.profile.timeline import profiled_steps, read_timeline
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.trainer import profiling
from rlhf3d.trainer.profiling import Profiler, Recorders

AHEAD = 7_000_000_000
"""How far the other machine's clock is ahead, ns."""


class Actor:
    """A rank on some machine, which begins to record when it is asked to."""

    def __init__(self, machine: str, ahead: int, starts: bool = True) -> None:
        self.machine, self.ahead, self.starts = machine, ahead, starts
        self.operations: OperationsSettings | None = None
        self.began = self.told_began = 0

    def start_profile(self, operations: OperationsSettings | None) -> str:
        if not self.starts:
            raise RuntimeError("no such rank")
        self.began, self.operations = self.clock_ns(), operations
        return self.machine

    def clock_ns(self) -> int:
        return time.monotonic_ns() + self.ahead

    def take_profile(self, began: int) -> Record | None:
        self.told_began = began
        return Record(self.machine, (Span("call", "call", self.began, self.clock_ns()),))


@pytest.fixture(autouse=True)
def calls_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's calls as calls."""

    def start_call(actor: Any, method: Callable[..., Any], *args: Any) -> Any:
        return getattr(actor, method.__name__)(*args)

    monkeypatch.setattr(profiling, "start_call", start_call)
    monkeypatch.setattr(profiling, "gather", lambda _, calls, __: list(calls.values()))
    yield
    take_record()


def make(folder: Path, actors: list[Actor], engine: Actor, operations_s: float = 0.0) -> Profiler:
    layout = ParallelLayout(pp=len(actors))
    named = {f"actor rank {rank}": actor for rank, actor in enumerate(actors)}
    group: Any = SimpleNamespace(name="actor", layout=layout, ranks=lambda: named)
    handle = SimpleNamespace(ranks=lambda: [("engine 0", engine)])
    rollout: Any = SimpleNamespace(engines=[handle])
    recorders = Recorders([group], rollout, 10.0, operations_s)
    return Profiler([2], folder, recorders, Console(io.StringIO(), interactive=False))


def test_other_machines_come_to_the_drivers_clock(tmp_path: Path) -> None:
    near, far = Actor(this_machine(), 0), Actor("elsewhere", AHEAD)
    profiler = make(tmp_path, [near, far], Actor("elsewhere", AHEAD))
    with profiler.step(1):
        assert recorder() is None
    with profiler.step(2), span("generate", "phase"):
        time.sleep(0.01)
    assert profiled_steps(tmp_path) == [2] and recorder() is None
    found = read_timeline(tmp_path, 2)
    assert [lane.process.name for lane in found.lanes] == [
        "driver",
        "actor tp0 pp0 dp0",
        "actor tp0 pp1 dp0",
        "engine 0",
    ]
    assert [lane.process.stages for lane in found.lanes] == [1, 2, 2, 1]
    slack = 100_000_000
    for lane in found.lanes:
        (one,) = lane.record.spans
        assert -slack < one.began <= one.ended < found.ended + slack
    errors = [lane.offset.error_ns for lane in found.lanes]
    assert errors[:2] == [0, 0] and all(0 < error < slack for error in errors[2:])
    assert abs(far.told_began - near.told_began - AHEAD) < slack


def test_operations_are_asked_for_by_process(tmp_path: Path) -> None:
    rank, engine = Actor("a", 0), Actor("a", 0)
    with make(tmp_path, [rank], engine, operations_s=2.0).step(2):
        pass
    folder = str(tmp_path / "profile" / "step_000002")
    assert rank.operations == OperationsSettings(folder, "actor tp0 pp0 dp0", 2.0)
    assert engine.operations == OperationsSettings(folder, "engine 0", 2.0)


def test_a_profile_that_fails_ends_no_run(tmp_path: Path) -> None:
    profiler = make(tmp_path, [Actor("a", 0)], Actor("a", 0, starts=False))
    with profiler.step(2):
        pass
    assert "step 2 is not profiled (RuntimeError: no such rank)" in printed(profiler)
    assert not (tmp_path / "profile").exists()
    (tmp_path / "profile").write_text("a file where the folder should be")
    again = make(tmp_path, [Actor("a", 0)], Actor("a", 0))
    with again.step(2):
        pass
    assert "step 2 is not profiled" in printed(again)


def test_an_error_of_the_step_is_the_steps(tmp_path: Path) -> None:
    profiler = make(tmp_path, [Actor("a", 0)], Actor("a", 0))
    with pytest.raises(KeyError), profiler.step(2):
        raise KeyError
    assert recorder() is None and profiled_steps(tmp_path) == []


def printed(profiler: Profiler) -> str:
    file: Any = profiler.console._rich.file
    return str(file.getvalue())
