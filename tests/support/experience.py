"""Trajectories and scores for tests of what comes after generation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.observability.live.state import Waited
from rlhf3d.rewards.score import Outcome, Score, ScoreItem
from rlhf3d.rollout.api import Completion, FinishReason, Request, written_by


def prompt(index: int, length: int = 1) -> Prompt:
    return Prompt((4,) * length, "test", str(index), {}, index, f"question {index}")


def row(
    score: float | Score,
    group: int = 0,
    *,
    tokens: Sequence[int] = (7,),
    reward: float | None = None,
    greedy_reward: float | None = None,
    finish: FinishReason = "stop",
    prompt_length: int = 1,
    data_source: str = "test",
) -> ScoredTrajectory:
    """One trajectory of policy 0 with log-probs of 0; its reward is its score unless given."""
    if not isinstance(score, Score):
        score = Score(float(score), Outcome.SCORED)
    asked = Prompt((4,) * prompt_length, data_source, "", {}, group, "")
    span = Span("sampled", tokens, (0.0,) * len(tokens), written_by(0))
    trajectory = Trajectory(asked, group, (Row(asked.prompt_ids, (span,)),), finish)
    reward = score.value if reward is None else reward
    return ScoredTrajectory(trajectory, "", score, reward, greedy_reward)


def in_groups(scores: Sequence[float | Score], n: int, first: int = 0) -> Experience:
    """Groups of n, numbered from `first`."""
    return Experience([row(score, first + i // n) for i, score in enumerate(scores)])


class FakeRewards:
    """Scores items by what `values` says of their number, in place of processes."""

    def __init__(self, values: Mapping[int, Score | float] | None = None) -> None:
        self.values = dict(values or {})
        self.items: dict[int, ScoreItem] = {}
        self.arrivals: list[list[int]] = []
        self.model = None
        self.left_out: set[int] = set()

    def start(self, total: int, judged_by: int) -> FakeRewards:
        self.items, self.arrivals, self.left_out = {}, [], set()
        return self

    def add(self, items: Mapping[int, ScoreItem]) -> None:
        assert not self.items.keys() & items.keys()
        self.items.update(items)
        self.arrivals.append(sorted(items))

    def leave_out(self, numbers: Collection[int]) -> None:
        self.left_out.update(numbers)

    waited = Waited(["the scorer"], 0.0, 1.0)

    def wait(self, timeout_s: float | None) -> bool:
        return True

    def finish(self) -> list[Score]:
        scores = []
        for number in sorted(self.items):
            value = self.values.get(number, 0.0)
            scores.append(value if isinstance(value, Score) else Score(value, Outcome.SCORED))
        return scores


class FakeEngine:
    """Answers the last request first, with `sampled` or `greedy` tokens of policy 1."""

    def __init__(self, sampled: Sequence[int] = (8, 8), greedy: Sequence[int] = (9, 9)) -> None:
        self.sampled, self.greedy = sampled, greedy
        self.requests: list[Request] = []
        """Every request, in the order submitted."""
        self._waiting: dict[int, Request] = {}

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Mapping[int, Request]) -> None:
        self.requests += requests.values()
        self._waiting |= requests

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        if not self._waiting:
            return {}
        number, request = self._waiting.popitem()
        tokens = self.greedy if request.sampling.greedy else self.sampled
        return {number: Completion(tokens, (-1.5,) * len(tokens), "stop", written_by(1))}

    def abort(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self._waiting.pop(number, None)
