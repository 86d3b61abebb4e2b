"""Engines repeat what a journal has of them, though their requests come at other times.

With a stand-in for vLLM whose completions tell all that came before them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.local_engines import LocalEngines

from rlhf3d.placement.journal import JOURNAL_FILE, JournalWriter, read_journal
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.script import Divergence, Script
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, turn_seed, written_by

ENGINES, TRAJECTORIES, TURNS = 2, 24, 3


class StandIn:
    """A token a step for each request; a completion's log-prob depends on every step before it."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.state = 1

    @property
    def unfinished(self) -> bool:
        return bool(self.left)

    can_step = unfinished

    def agree(self, number: int, timeout_s: float) -> int:
        return number

    def publish(self, policy_version: int) -> None:
        self._note(policy_version)

    def cached_tokens(self) -> int:
        self._note(0)
        return self.state

    def submit(self, requests: Mapping[int, Request]) -> None:
        self.left |= {number: one.sampling.max_tokens for number, one in requests.items()}
        self.prompts |= {number: tuple(one.prompt_ids) for number, one in requests.items()}

    def abort(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self.left.pop(number, None)

    def step(self) -> dict[int, Completion]:
        time.sleep(0.003)
        self._note(*(self.prompts[number] for number in self.left))
        self.left = {number: left - 1 for number, left in self.left.items()}
        done = [number for number, left in self.left.items() if not left]
        self.abort(done)
        made = Completion((self.state,), (float(self.state),), "stop", written_by(0))
        return dict.fromkeys(done, made)

    def close(self) -> None:
        """As vLLM's."""

    def _note(self, *what: Any) -> None:
        # Numbers alone: Python's hash of a text differs from process to process.
        self.state = hash((self.state, what)) % 65_521


@contextmanager
def engines_of(
    folder: Path, script: Script | None = None, timeout_s: float = 60.0
) -> Iterator[RolloutGroup]:
    """Engines that keep a journal in `folder`."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, JournalWriter(folder) as journal:
        journal.begin(0, {})
        engines = LocalEngines(lambda number: StandIn(), ENGINES, patch, journal, script, timeout_s)
        engines.publish(0)
        yield engines
        engines.close()
        journal.trained(1, ())


def turn(trajectory: int, number: int) -> Request:
    """A turn of a trajectory: prompts grow, and lengths differ."""
    prompt = (trajectory,) * (number + 1)
    tokens = 1 + (7 * trajectory + 5 * number) % 11
    name = f"b0.p{trajectory}.s0.t{number}.a0"
    sampling = SamplingSettings(max_tokens=tokens)
    return Request(prompt, turn_seed(trajectory, number), sampling, name=name)


def talk(engines: RolloutGroup, seed: int, turns: int = TURNS) -> dict[int, list[float]]:
    """Trajectories whose environments answer after random times; their completions.

    One is given up in its first turn, and the trainer asks something in the middle.
    """
    chance = random.Random(seed)
    waiting = dict.fromkeys(range(TRAJECTORIES), 0.0)
    turns_of = dict.fromkeys(waiting, 0)
    made: dict[int, list[float]] = {trajectory: [] for trajectory in waiting}
    writing: set[int] = set()

    def go_on() -> bool:
        now = time.monotonic()
        ready = [one for one, until in waiting.items() if until <= now]
        chance.shuffle(ready)
        for one in ready:
            del waiting[one]
            engines.submit({one: turn(one, turns_of[one])})
            writing.add(one)
            turns_of[one] += 1
            if one == 5:
                engines.abort([5])
                writing.discard(5)
        for one, completion in engines.poll(0.002).items():
            writing.remove(one)
            made[one].append(completion.logprobs[0])
            if turns_of[one] < turns:
                waiting[one] = time.monotonic() + chance.random() * 0.05
        return bool(waiting or writing)

    engines.meanwhile = go_on
    asked = False
    while go_on():
        if not asked and sum(map(len, made.values())) > TRAJECTORIES:
            engines.cached_tokens()
            asked = True
    assert asked
    return made


def rows(folder: Path) -> list[str]:
    """Lines about commands, in a fixed order."""
    lines = (folder / JOURNAL_FILE).read_text().splitlines()
    return sorted(line for line in lines if '"command"' in line)


def test_engines_repeat_a_run_whenever_requests_come(tmp_path: Path) -> None:
    with engines_of(tmp_path / "run") as engines:
        run = talk(engines, seed=1)
    with engines_of(tmp_path / "other") as engines:
        assert talk(engines, seed=2) != run, "times change what engines do"
    (segment,) = read_journal(tmp_path / "run")
    assert any(segment.schedules[engine][-1] > 20 for engine in range(ENGINES))
    with engines_of(tmp_path / "again", Script(segment)) as engines:
        assert talk(engines, seed=3) == run
    assert rows(tmp_path / "again") == rows(tmp_path / "run")
    # A trajectory that ends sooner than in the run: its next turn never comes.
    script = Script(read_journal(tmp_path / "run")[0])
    with (
        pytest.raises(Divergence, match=r"submit did not come .*\.t2\.a0"),
        engines_of(tmp_path / "shorter", script, timeout_s=2) as engines,
    ):
        talk(engines, seed=4, turns=2)


def test_requests_that_the_run_did_not_make_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    """As where a step needs more of them, while the next command is the trainer's."""
    with engines_of(tmp_path / "run") as engines:
        engines.submit({0: turn(0, 0)})
        while not engines.poll(1):
            pass
        engines.cached_tokens()
    script = Script(read_journal(tmp_path / "run")[0])
    named = r"after 1 s cached_tokens did not come .*requests that the run has not: b0\.p1"
    with engines_of(tmp_path / "again", script, timeout_s=1) as engines:
        engines.submit({0: turn(0, 0), 1: turn(1, 0)})
        with pytest.raises(Divergence, match=named):
            for _ in range(100):
                engines.poll(0.0)  # in the background, where the trainer goes on, no time counts
                engines.poll(1)
        engines.cached_tokens()
