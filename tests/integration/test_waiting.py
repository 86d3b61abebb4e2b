"""Waiting on Ray actors: deadlines, and whose traceback is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import ray

from rlhf3d.config.schema import ClusterConfig
from rlhf3d.observability.live.state import Waited
from rlhf3d.observability.live.waits import waited, waiting_for
from rlhf3d.placement.cluster import ray_cluster, reserve
from rlhf3d.placement.resources import Placement
from rlhf3d.placement.waiting import WorkerFailure, gather, take_ready


class Worker:
    """An actor that answers, fails, hangs or dies."""

    def answer(self, value: int) -> int:
        return value

    def fail(self) -> None:
        raise KeyError("the cause")

    def fail_later(self) -> None:
        time.sleep(0.3)
        raise KeyError("the cause")

    def lose_peer(self) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    def hang(self) -> None:
        time.sleep(3600)

    def die(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module")
def workers() -> Iterator[list]:
    with ray_cluster(ClusterConfig(), local_cpus=3):
        made = [ray.remote(Worker).options(num_cpus=1, max_restarts=0).remote() for _ in range(3)]
        # No test waits for their start.
        ray.get([worker.answer.remote(0) for worker in made], timeout=120)
        yield made


def take_first(calls: dict) -> dict:
    """What has ended first; a look itself takes a second at most."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if ended := take_ready("generate", calls, 60):
            return ended
    raise TimeoutError(f"nothing ended of {list(calls)}")


def test_results_keep_their_order(workers: list) -> None:
    calls = {f"rank {i}": worker.answer.remote(i) for i, worker in enumerate(workers)}
    assert gather("phase", calls, 60) == [0, 1, 2]


def test_who_is_waited_for_can_be_asked(workers: list) -> None:
    """By work that goes on meanwhile, say, or by the thread that draws the live view."""
    seen: list[list[str]] = []

    def look() -> bool:
        with waiting_for(Waited(["engine 0"], 0.0, 1.0)):  # a wait inside the wait
            if (wait := waited()) is not None:
                seen.append(wait.names)
        return True

    calls = {f"rank {i}": worker.answer.remote(i) for i, worker in enumerate(workers)}
    gather("phase", calls, 60, look)
    assert seen[0] == ["rank 0", "rank 1", "rank 2"] and waited() is None
    with pytest.raises(WorkerFailure):
        gather("phase", {"rank 0": workers[0].fail.remote()}, 60)
    assert waited() is None


def test_what_has_ended_is_taken_and_the_rest_stays(workers: list) -> None:
    calls = {"rank 0": workers[0].answer.remote(7), "rank 1": workers[1].hang.remote()}
    assert take_first(calls) == {"rank 0": 7}
    assert list(calls) == ["rank 1"] and take_ready("generate", calls, 0.1) == {}
    calls["rank 2"] = workers[2].fail.remote()
    with pytest.raises(
        WorkerFailure, match=r"(?s)generate failed on rank 2:.*KeyError: 'the cause'"
    ):
        take_first(calls)
    ray.kill(workers[1])
    workers[1] = ray.remote(Worker).options(num_cpus=1, max_restarts=0).remote()
    ray.get(workers[1].answer.remote(0))  # the next test's calls are not to wait for its start


def test_the_cause_is_shown_and_not_its_echo(workers: list) -> None:
    calls = {"rank 0": workers[0].lose_peer.remote(), "rank 1": workers[1].fail.remote()}
    ray.wait(list(calls.values()), num_returns=2, timeout=60)
    with pytest.raises(
        WorkerFailure, match=r"(?s)update_actor failed on rank 1:.*KeyError: 'the cause'.*rank 0"
    ):
        gather("update_actor", calls, 60)


def test_a_cause_that_comes_after_its_echo_is_waited_for(workers: list) -> None:
    calls = {"rank 0": workers[0].lose_peer.remote(), "rank 1": workers[1].fail_later.remote()}
    with pytest.raises(WorkerFailure, match=r"(?s)update_actor failed on rank 1:.*the cause"):
        gather("update_actor", calls, 60)


def test_a_node_is_suspected_where_only_a_lost_peer_is_known(workers: list) -> None:
    for method, suspected in (("lose_peer", True), ("fail", False)):
        with pytest.raises(WorkerFailure) as failed:
            gather("update_actor", {"rank 0": getattr(workers[0], method).remote()}, 60)
        assert failed.value.lost_touch is suspected


def test_cluster_too_small_is_the_users_mistake(workers: list) -> None:
    too_many = Placement([{"CPU": 1.0}] * 9, "PACK", {}, [[bundle] for bundle in range(9)], {})
    with (
        pytest.raises(ValueError, match=r"the run needs 9 x \(1 CPU\), but after 2 s"),
        reserve(too_many, timeout_s=2),
    ):
        pass


def test_deadline_names_who_was_waited_for(workers: list) -> None:
    calls = {"rank 0": workers[0].answer.remote(1), "rank 1": workers[1].hang.remote()}
    ray.wait([calls["rank 0"]], timeout=60)
    with pytest.raises(WorkerFailure, match="generate: no answer within 2 s from rank 1;"):
        gather("generate", calls, 2)


def test_a_dead_process_is_named(workers: list) -> None:
    with pytest.raises(WorkerFailure, match=r"(?s)values failed on rank 2:.*died"):
        gather("values", {"rank 2": workers[2].die.remote()}, 60)


LOSES_RAY = """
import os, signal, sys, threading, time
import psutil, ray
from rlhf3d.config.schema import ClusterConfig
from rlhf3d.placement.cluster import ray_cluster
from rlhf3d.placement.waiting import WorkerFailure, gather
from rlhf3d.trainer.preemption import Preempted, PreemptionHandler

@ray.remote
class Worker:
    def hang(self):
        print("hangs", flush=True)
        time.sleep(3600)

def act():
    if sys.argv[1] == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        next(child for child in psutil.Process().children() if child.name() == sys.argv[1]).kill()

stopping = PreemptionHandler(None, 0.0)
try:
    with stopping.handling_signals(), ray_cluster(ClusterConfig(), 1, stopping.handle):
        call = Worker.remote().hang.remote()
        threading.Timer(2.0, act).start()
        began = time.monotonic()
        gather("phase", {"rank 0": call}, 600)
except WorkerFailure as error:
    print(error)
except Preempted:
    print("preempted")
print(time.monotonic() - began)
"""


@pytest.mark.parametrize("name", ["raylet", "gcs_server", "SIGTERM"])
def test_the_end_of_ray_itself_is_one_sentence_soon_and_leaves_nothing(name: str) -> None:
    """So is a signal in a wait on Ray, whose calls may return although its handler raised."""
    from support.jobs import MARKED, left_behind  # Ray's workers, which import this file, cannot

    done = subprocess.run(
        [sys.executable, "-c", LOSES_RAY, name],
        env=MARKED,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told, seconds = done.stdout.splitlines()
    # Which signal ended it is not known where another waits for it first.
    sentence = rf"Ray's {name} on this machine \(process \d+\) (was )?ended\b.*checkpoint"
    assert re.fullmatch("preempted" if name == "SIGTERM" else sentence, told)
    assert float(seconds) < 50  # Ray's own wait is a minute
    assert left_behind() == set()
