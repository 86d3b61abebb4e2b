"""A run with groups in flight, and the same again from its journal, at other times.

Environments take random times, weights enter while requests run; the engines' completions tell all
that came before them. With threads for processes, and a stand-in for vLLM.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any, cast

import pytest
from support.experience import FakeRewards
from support.local_engines import LocalEngines
from support.talking import TOKENIZER, Echo, asked, failed, rules

from rlhf3d.environments.api import Call, Reset, Step
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environment_runner import EnvironmentRunner
from rlhf3d.experience.in_flight import InFlight, InFlightSettings
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.source import OnPolicy, OnPolicySettings
from rlhf3d.experience.steps import Patience, untimed
from rlhf3d.placement.journal import JournalWriter, read_journal
from rlhf3d.placement.script import Divergence, Script
from rlhf3d.placement.waiting import gather
from rlhf3d.pool.process import CallResult, Ending
from rlhf3d.rewards.parts import EnvironmentPart
from rlhf3d.rollout.api import Completion, Request, SamplingSettings
from rlhf3d.rollout.desk import Desks

N, GROUPS, STEPS, STALENESS, TURNS = 2, 3, 4, 2, 3
FAILS = 4


class StandIn:
    """Writes a letter a step for each request; which one depends on every step before it."""

    unfinished = False

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self.written: dict[int, list[tuple[int, int]]] = {}
        """Token and version."""
        self.version: int | None = None
        self.state = 0

    @property
    def can_step(self) -> bool:
        return self.unfinished and self.version is not None

    def agree(self, number: int, timeout_s: float) -> int:
        return number

    def submit(self, requests: Mapping[int, Request]) -> None:
        self.requests |= requests
        self.written |= {number: [] for number in requests}
        self.unfinished = True

    def abort(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self.requests.pop(number, None)
        self.unfinished = bool(self.requests)

    def update_weights(self, policy_version: int, sync: int) -> None:
        self.version = None

    def publish(self, policy_version: int) -> None:
        self.version = policy_version

    def step(self) -> dict[int, Completion]:
        time.sleep(0.002)
        assert self.version is not None
        for number, request in self.requests.items():
            what = (self.state, self.version, request.seed, *request.prompt_ids[-3:])
            self.state = hash(what) % 65_521
            self.written[number].append((97 + self.state % 26, self.version))
        done = {}
        for number in [n for n, r in self.requests.items() if self._ends(n, r)]:
            done[number] = self._completion(self.written.pop(number))
            del self.requests[number]
        self.unfinished = bool(self.requests)
        return done

    def close(self) -> None:
        """As vLLM's."""

    def _ends(self, number: int, request: Request) -> bool:
        return len(self.written[number]) >= 5 + request.seed % 4

    def _completion(self, written: list[tuple[int, int]]) -> Completion:
        versions: list[tuple[int, int]] = []
        for place, (_, version) in enumerate(written):
            if not versions or versions[-1][1] != version:
                versions.append((place, version))
        ids = [token for token, _ in written]
        return Completion(ids, [float(self.state)] * len(ids), "stop", tuple(versions))


class Slow:
    """Environments that reply after a time that chance gives them; those of one prompt fail."""

    def __init__(self, chance: random.Random, turns: int) -> None:
        self._chance, self._turns = chance, turns

    def session(self) -> Slow:
        return Slow(self._chance, self._turns)

    def call(self, payload: Call, timeout_s: float) -> Future[CallResult]:
        future: Future[CallResult] = Future()
        reply = CallResult(Ending.VALUE, Echo()(payload))
        if isinstance(payload, Reset):
            self._fails = payload.row["index"] == FAILS
        elif isinstance(payload, Step):
            self._turns -= 1
            if self._fails:
                reply = failed()
            elif not self._turns:
                reply = CallResult(Ending.VALUE, replace(reply.value, done=True))
        timer = Timer(0.03 * self._chance.random() ** 3, future.set_result, [reply])
        timer.daemon = True
        timer.start()
        return future

    def close(self) -> None:
        """Nothing to end."""


class Scores(FakeRewards):
    """Scores several collections at once."""

    def start(self, total: int, judged_by: int) -> FakeRewards:
        return FakeRewards(self.values)


class Loader:
    """Two prompts at a time."""

    served = 0

    def next_batch(self) -> list[Any]:
        self.served += 2
        return [asked(self.served - 2), asked(self.served - 1)]

    def state_dict(self) -> dict[str, int]:
        return {}


def run(
    folder: Path,
    seed: int,
    script: Script | None = None,
    turns: int = TURNS,
    metric: str | None = None,
) -> list[Experience]:
    """What each step trained on; `seed` is of the times alone."""
    folder.mkdir()
    chance = random.Random(seed)
    trained, served = 0, cast("int | None", None)
    experiences: list[Experience] = []
    with pytest.MonkeyPatch.context() as patch, JournalWriter(folder) as journal:
        journal.begin(0, {})
        engines = LocalEngines(lambda number: StandIn(), 2, patch, journal, script)

        def sync() -> dict[str, float]:
            nonlocal served
            loads = engines.start_update_weights(trained, trained)
            served = None  # as `WeightSync`
            gather("sync_weights", loads, engines.timeout_s)
            engines.publish(trained)
            served = trained
            return {}

        settings = rules(max_turns=9, max_concurrent=64, retries=1, max_error_rate=0.9)
        desks = Desks(engines)
        player = EnvironmentRunner(Slow(chance, turns), settings)
        scores, loader, patience = Scores(), Loader(), Patience()
        collector = Collector(
            desks.open(),
            scores,
            TOKENIZER,
            untimed,
            player,
            EnvironmentPart(1.0),
            patience,  # type: ignore[arg-type]
        )
        drawing = OnPolicySettings(n=N, sampling=SamplingSettings(max_tokens=300), seed=0)
        source = InFlight(
            InFlightSettings(GROUPS, N, STALENESS, STEPS, metric=metric),
            OnPolicy(drawing, loader, collector, lambda: served),  # type: ignore[arg-type]
            collector,
            desks,
            sync,
            lambda: trained,
            lambda: served,
            patience,
            untimed,
            asked,
            script,
        )
        engines.meanwhile = source.go_on
        for step in range(1, STEPS + 1):
            experience = source.next_batch(step)
            batch = experience.trajectories
            for _ in range(chance.randrange(12)):
                source.go_on()
                time.sleep(0.01 * chance.random())
            names = [one.trajectory.name for one in batch]
            journal.trained(step, names, experience.ended)
            if script is not None:
                script.trained(step, names)
            experiences.append(experience)
            trained += 1
        source.close()
        engines.close()
    return experiences


def contents(experiences: Sequence[Experience]) -> list[Any]:
    """Names, tokens, log-probs, versions, rewards, and what was left out: all but seconds."""
    found: list[Any] = []
    for one in experiences:
        for scored in (*one.trajectories, *one.left_out):
            found.append((scored.trajectory.name, scored.trajectory.rows, scored.reward))
        found.append((one.ended, one.drawn))
    return found


def test_a_run_in_flight_is_repeated_whatever_the_times_are(tmp_path: Path) -> None:
    first = run(tmp_path / "run", seed=0)
    trained = [scored.trajectory for one in first for scored in one.trajectories]
    ages = [one.newest_version - one.oldest_version for one in trained]
    assert max(ages) > 0, "weights entered while trajectories were written"
    left_out = {scored.trajectory.prompt.index for one in first for scored in one.left_out}
    assert left_out == {FAILS}
    other = run(tmp_path / "other", seed=1)
    assert contents(other) != contents(first), "times change what is trained on"
    for seed in (1, 2, 3):
        (segment,) = read_journal(tmp_path / "run")
        again = run(tmp_path / f"again{seed}", seed, Script(segment))
        assert contents(again) == contents(first)
    # A trajectory that ends sooner is seen at its end, one that goes on when it does.
    for turns, named in (
        (TURNS - 1, "has ended, and in the run"),
        (TURNS + 1, "none of the run's"),
    ):
        (segment,) = read_journal(tmp_path / "run")
        with pytest.raises(Divergence, match=named):
            run(tmp_path / f"turns{turns}", 4, Script(segment), turns)


@pytest.mark.timeout(300)
def test_rewards_with_which_a_group_is_not_trained_on_are_named(tmp_path: Path) -> None:
    """As where a reward function was edited: its step waits for none that does not come."""
    run(tmp_path / "run", seed=0)
    (segment,) = read_journal(tmp_path / "run")
    with pytest.raises(Divergence, match=r"is not to be trained on .* in the run step \d"):
        run(tmp_path / "again", 0, Script(segment), metric="acc")
