"""Trajectories whose tools sleep with a heavy tail, fail, exit and hang: what becomes of each.

    python tools/bench/heavy_tail.py [--trajectories 1000] [--scale 1.0] [--concurrent 256]

The engine is a fake that answers at once, so that only environments take time; they run as in
training, in processes of their own. Each call sleeps 0.1 to 20 s (Pareto, exponent 1.1) times
`--scale`. By its row's number an environment works (92 %), works at the second attempt (2 %),
raises (2 %), ends its process (2 %) or hangs (2 %). Every trajectory must end as its row says, with
the rewards of its own row, and no call may be waited for beyond its deadline.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environments import start_environments
from rlhf3d.experience.requests import Requests
from rlhf3d.experience.scored import ScoredTrajectory
from rlhf3d.rehearsal.miniature import byte_tokenizer
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.parts import EnvironmentPart
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, written_by
from rlhf3d.tokenizer.chat import tokenize

TURNS = 3
FATES = ("works",) * 46 + ("flaky", "raises", "exits", "hangs")
OUTCOMES = {
    "works": "scored",
    "flaky": "scored",
    "raises": "env_error",
    "exits": "env_error",
    "hangs": "env_timeout",
}
ENVIRONMENT = """
import os
import time
from pathlib import Path


class Sleeper:
    def reset(self, row, seed):
        self._row, self.turn, self.slept_s = row, 0, 0.0
        self.number = row["number"]

    def step(self, text):
        fate = self._row["fate"]
        if fate == "flaky" and self.turn == 1:
            try:
                Path(self._row["folder"], str(self.number)).touch(exist_ok=False)
            except FileExistsError:
                fate = "works"  # an attempt before has failed
        if self.turn == 1 and fate in ("flaky", "raises"):
            raise KeyError(f"row {self.number} fails")
        if self.turn == 1 and fate == "exits":
            os._exit(3)
        if self.turn == 1 and fate == "hangs":
            time.sleep(10**6)
        time.sleep(self._row["sleeps_s"][self.turn])
        self.slept_s += self._row["sleeps_s"][self.turn]
        self.turn += 1
        return f"row {self.number}", self.number + self.turn, self.turn == 3
"""


class InstantEngine:
    """Says `ok` at once."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._written: dict[int, Completion] = {}

    def submit(self, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`."""
        logprobs = (-0.1,) * len(self._tokens)
        for number in requests:
            self._written[number] = Completion(self._tokens, logprobs, "stop", written_by(0))

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        """See `Engines.poll`."""
        written, self._written = self._written, {}
        return written

    def abort(self, numbers: Collection[int]) -> None:
        """See `Engines.abort`."""


def prompts(count: int, scale: float, folder: str, tokenizer: Any) -> list[Prompt]:
    """Rows that say what their environments will do."""
    draw, made = random.Random(0), []
    for number in range(count):
        tail = [0.1 * (1 - draw.random()) ** (-1 / 1.1) for _ in range(TURNS)]
        messages = [{"role": "user", "content": "go"}]
        columns = {
            "prompt": messages,
            "number": number,
            "fate": FATES[number % len(FATES)],
            "folder": folder,
            "sleeps_s": [min(20.0, sleep_s) * scale for sleep_s in tail],
        }
        ids = tokenize(tokenizer, messages)
        made.append(Prompt(ids, "sleep", "", {}, number, "go", messages, columns=columns))
    return made


def judge(rows: Sequence[ScoredTrajectory], call_timeout_s: float) -> dict[str, Any]:
    """What became of the trajectories; `wrong` must be empty."""
    wrong, over_s, beyond_s = [], [], []
    for number, row in enumerate(rows):
        assert row.episode is not None
        fate, episode = row.trajectory.prompt.columns["fate"], row.episode
        scored = row.score.outcome.value == "scored"
        expected = float(sum(number + turn for turn in range(1, TURNS + 1)))
        right = row.score.outcome.value == OUTCOMES[fate]
        right = right and episode.retries == (fate != "works")
        right = right and row.reward == (expected if scored else 0.0)
        if scored:
            right = right and episode.record["number"] == number and episode.end == "done"
            over_s.append(sum(episode.calls_s) - episode.record["slept_s"])
        if not right:
            wrong.append(number)
        beyond_s.append(max(episode.calls_s) - call_timeout_s)
    return {
        "trajectories": len(rows),
        "outcomes": dict(Counter(row.score.outcome.value for row in rows)),
        "wrong": wrong,
        "longest_wait_beyond_the_deadline_s": round(max(0.0, *beyond_s), 3),
        "overhead_of_4_calls_s": {
            "median": round(sorted(over_s)[len(over_s) // 2], 4),
            "max": round(max(over_s), 3),
        },
    }


def measure(count: int, scale: float, concurrent: int, call_timeout_s: float) -> dict[str, Any]:
    """Play `count` trajectories; what became of them, and how long it took."""
    tokenizer = byte_tokenizer(128)
    said = [*tokenizer.encode("ok", add_special_tokens=False), tokenizer.eos_token_id]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        file = Path(folder) / "sleeper.py"
        file.write_text(ENVIRONMENT)
        config = EnvironmentConfig(
            path=str(file),
            name="Sleeper",
            call_timeout_s=call_timeout_s,
            retries=1,
            max_error_rate=0.1,
            max_concurrent=concurrent,
        )
        asked = prompts(count, scale, folder, tokenizer)
        runner = start_environments(stack, config, 64, "error", tokenizer, (), print)
        rewards = stack.enter_context(RewardManager(None))
        part = EnvironmentPart(1.0, alone=True)
        collector = Collector(
            InstantEngine(said), rewards, tokenizer, runner=runner, environment=part
        )
        requests = Requests(0, 0).draw(asked, 1, SamplingSettings(max_tokens=400))
        start = time.monotonic()
        rows = collector.collect(requests)
        wall_s = time.monotonic() - start
    calls_s = [sum(row.episode.calls_s) for row in rows if row.episode is not None]
    return {
        **judge(rows, call_timeout_s),
        "wall_s": round(wall_s, 2),
        "calls_one_after_the_other_s": round(sum(calls_s), 1),
        "longest_trajectory_s": round(max(calls_s), 2),
    }


def main() -> int:
    """Measure and print; 1 where a trajectory was lost or scored wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--concurrent", type=int, default=256)
    parser.add_argument("--call-timeout-s", type=float, default=30.0)
    args = parser.parse_args()
    figures = measure(args.trajectories, args.scale, args.concurrent, args.call_timeout_s)
    print(json.dumps(figures, indent=1))
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
