"""`python -m support.kills MOMENTS train …`: the command, in which processes are killed.

MOMENTS: `phase:occasion:who` with commas; who is `driver`, `trainer:RANK` or `ENGINE:RANK`. Such as
`generate:2:1:0`: rank 0 of engine 1, at the second generation, or the first later chance. `ahead`
is a generation at which the driver looks while it waits for training ranks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from rlhf3d.cli import main
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.rewards.manager import ScoringBatch
from rlhf3d.trainer.checkpointing import CheckpointWriter
from rlhf3d.trainer.learner import Learner


class Killer:
    """Kills what is asked for, once each."""

    def __init__(self, moments: str) -> None:
        self.moments = moments.split(",")
        self.occasions: Counter[str] = Counter()
        self.rollout: RolloutGroup
        self.actor: TrainGroup

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self.occasions[phase] += 1

    def kill(self, phase: str) -> None:
        """Kill who is to die at this occasion of a phase, if that was not done."""
        for moment in list(self.moments):
            name, occasion, *who = moment.split(":")
            if name == phase and self.occasions[phase] >= int(occasion):
                # One that has just been killed and is not there again is killed later.
                with suppress(ray.exceptions.ActorDiedError):
                    self._kill(moment, *who)

    def _kill(self, moment: str, who: str, rank: str = "0") -> None:
        if who == "driver":
            self._done(moment)
            os.kill(os.getpid(), signal.SIGKILL)
        elif who == "trainer":
            self._done(moment)
            ray.kill(self.actor.workers[int(rank)])  # it takes no call while it computes
        else:
            actor = self.rollout.engines[int(who)].actors[int(rank)]
            process = ray.get(actor.process_id.remote())
            self._done(moment)
            os.kill(process, signal.SIGKILL)

    def _done(self, moment: str) -> None:
        self.moments.remove(moment)
        print(f"kill {moment}", flush=True)


KILLER = Killer(sys.argv[1])


def around(owner: type, name: str) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of a method, which it gets as its first argument."""

    def put(function: Callable[..., Any]) -> None:
        method = getattr(owner, name)

        def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, RolloutGroup):
                KILLER.rollout = self
            if isinstance(self, TrainGroup) and self.name == "actor":
                KILLER.actor = self
            return function(method, self, *args, **kwargs)

        setattr(owner, name, replaced)

    return put


@around(RolloutGroup, "submit")
def submit(method: Callable[..., Any], self: Any, requests: Any) -> Any:
    KILLER.begin("generate")
    KILLER.begin("ahead")
    return method(self, requests)


@around(RolloutGroup, "poll")
def poll(method: Callable[..., Any], self: Any, timeout_s: float) -> Any:
    if timeout_s == 0 and self._unfinished:
        KILLER.kill("ahead")
    completions = method(self, timeout_s)
    # Some are answered, others are not.
    if completions and self._unfinished:
        KILLER.kill("generate")
    return completions


@around(RolloutGroup, "start_update_weights")
def start_update_weights(method: Callable[..., Any], self: Any, *args: Any) -> Any:
    KILLER.begin("sync_weights")
    calls = method(self, *args)
    KILLER.kill("sync_weights")
    return calls


@around(RolloutGroup, "sleep")
def sleep(method: Callable[..., Any], self: Any) -> Any:
    KILLER.begin("sleep")
    KILLER.kill("sleep")
    return method(self)


@around(TrainGroup, "start_all")
def start_all(method: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    return method(self, *args, **kwargs)


@around(ScoringBatch, "finish")
def finish(method: Callable[..., Any], self: Any) -> Any:
    KILLER.begin("score")
    KILLER.kill("score")
    return method(self)


@around(CheckpointWriter, "_collect")
def collect(method: Callable[..., Any], self: Any, save: Any) -> Any:
    KILLER.begin("save")
    KILLER.kill("save")
    return method(self, save)


@around(Learner, "update_actor")
def update_actor(method: Callable[..., Any], self: Any, *args: Any) -> Any:
    KILLER.begin("update_actor")
    KILLER.kill("update_actor")
    return method(self, *args)


if __name__ == "__main__":
    sys.argv[1:] = sys.argv[2:]
    main()
