"""Ray that does not start on this machine: a message, and the mistakes of others untouched."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import psutil
import pytest
import ray
from ray._private.node import Node
from ray.exceptions import RaySystemError

from rlhf3d.placement import ray_here


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (Exception("timed out."), RuntimeError, r"timed out\. The machine has \d+ CPUs"),
        (ValueError("no such folder"), ValueError, "^no such folder$"),
    ],
)
def test_a_machine_too_busy_for_ray_is_named(
    raised: Exception,
    expected: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**settings: Any) -> None:
        raise raised

    monkeypatch.setattr(ray_here.ray, "init", init)
    with pytest.raises(expected, match=message):
        ray_here._init(60.0, num_cpus=1)


@pytest.mark.parametrize(
    ("running", "looks"), [({"raylet"}, 4), ({"gcs_server"}, 1)], ids=["slow", "dead"]
)
def test_a_slow_node_is_waited_for_and_a_dead_one_is_not(
    running: set[str], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def look(*_: str) -> str:
        found.append(len(found))
        if len(found) < 4:
            raise RuntimeError("This node has an IP address of 10.0.0.1, and Ray expects ...")
        return "node"

    def init(**settings: Any) -> None:
        assert ray_here.services.get_node("address", "id") == "node"

    monkeypatch.setattr(ray_here.services, "get_node", look)
    monkeypatch.setattr(ray_here, "_own_processes", lambda: running)
    monkeypatch.setattr(ray_here.ray, "init", init)
    if running == {"raylet"}:
        ray_here._init(60.0)
    else:
        with pytest.raises(RuntimeError, match="expects"):
            ray_here._init(60.0)
    assert len(found) == looks
    assert ray_here.services.get_node is look


def test_another_way_to_look_for_the_node_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_here.ray, "init", lambda **settings: None)
    with pytest.raises(AssertionError, match="no longer looks"):
        ray_here._init(60.0)


def test_services_that_no_run_uses_are_left_out_of_a_start() -> None:
    own = [getattr(Node, name) for name in ray_here.LEFT_OUT]
    with ray_here._needed_only():
        for name in ray_here.LEFT_OUT:
            getattr(Node, name)(None, include_dashboard=False)
    assert [getattr(Node, name) for name in ray_here.LEFT_OUT] == own


def test_a_ray_that_starts_its_services_in_another_way_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="Ray asks only"), ray_here._needed_only():
        Node.start_monitor(None)


def test_a_call_after_the_end_starts_no_other_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> None:
        raise AssertionError("Ray starts itself")

    monkeypatch.setattr(ray, "init", init)
    ray_here.RayHere()
    with pytest.raises(RaySystemError):
        ray.put(1)


def test_a_process_of_ray_that_hides_its_mark_is_ended_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its agents do, whose titles are written over their environment."""
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_here, "END_S", 0.2)
    here = ray_here.RayHere()
    here._mark = "of this test"
    with subprocess.Popen(["sleep", "600"], env={}) as agent:
        here._agents = {psutil.Process(agent.pid)}
        here.end()
        assert agent.wait(60) == -signal.SIGKILL
