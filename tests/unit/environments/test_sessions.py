"""Environments in the processes of their trajectories."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.environments.api import Reply, Reset, Step
from rlhf3d.environments.load import Environments
from rlhf3d.pool.process import CallResult, Ending
from rlhf3d.pool.sessions import CallSession, SessionPool

GAME = """
    import asyncio, os, random, sys, time
    from pathlib import Path

    HERE = Path(__file__).parent

    class Game:
        def __init__(self): self.turns = 0

        async def reset(self, row, seed):
            self.pid, self.number = os.getpid(), random.random()
            self._loop = asyncio.get_running_loop()
            return row["text"]

        async def step(self, text):
            assert asyncio.get_running_loop() is self._loop
            self.turns += 1
            if text == "hang": time.sleep(600)
            if text == "crash": os._exit(3)
            if text == "exit": sys.exit(3)
            if text == "raise": raise KeyError("lost")
            return self.give(text), 0.5, text == "end"

        def give(self, text): return text

        def close(self): (HERE / f"closed_{self.turns}").touch()
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[SessionPool]:
    file = tmp_path / "game.py"
    file.write_text(dedent(GAME))
    settings = EnvironmentConfig(str(file), "Game")
    made = SessionPool(partial(Environments, settings), what="environment.path")
    yield made
    made.close()


def ended(session: CallSession, call: Any, timeout_s: float = 60.0) -> CallResult:
    return session.call(call, timeout_s).result(120)


def begin(pool: SessionPool, seed: int) -> tuple[CallSession, Reply]:
    session = pool.session()
    row = {"prompt": [{"role": "user", "content": "Go."}], "text": str(seed)}
    result = ended(session, Reset(row, seed))
    assert result.ending is Ending.VALUE, result.message
    return session, result.value


def test_each_trajectory_has_its_own(pool: SessionPool, tmp_path: Path) -> None:
    sessions = [begin(pool, seed) for seed in (1, 1, 2)]
    records = [reply.record for _, reply in sessions]
    assert len({record["pid"] for record in records}) == 3
    assert records[0]["number"] == records[1]["number"] != records[2]["number"]
    assert sessions[2][1].prompt == ({"role": "user", "content": "Go.\n\n2"},)
    for turns, (session, _) in enumerate(sessions):
        for _ in range(turns):
            reply = ended(session, Step("more")).value
            assert reply.messages == ({"role": "user", "content": "more"},)
        reply = ended(session, Step("end")).value
        assert (reply.done, reply.reward, reply.record["turns"]) == (True, 0.5, turns + 1)
        session.close()
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("closed_*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {file.name for file in tmp_path.glob("closed_*")} == {"closed_1", "closed_2", "closed_3"}


@pytest.mark.parametrize(
    ("text", "ending", "said"),
    [
        ("hang", Ending.TIMEOUT, "1.5 s"),
        ("crash", Ending.DIED, "exit code 3"),
        ("exit", Ending.ERROR, "ends the process"),
        ("raise", Ending.ERROR, "lost"),
    ],
)
def test_a_failure_costs_its_own(pool: SessionPool, text: str, ending: Ending, said: str) -> None:
    failing, _ = begin(pool, 1)
    other, _ = begin(pool, 2)
    result = ended(failing, Step(text), timeout_s=1.5 if text == "hang" else 30.0)
    assert result.ending is ending and said in result.message
    assert ended(other, Step("end")).value.done
