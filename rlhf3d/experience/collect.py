"""From requests to scored trajectories: the one way to ask engines for text and have it scored.

Training, validation and `rlhf3d evaluate` all come through here.

Invariant: every request ends as one scored trajectory, in the order of the requests; one whose
environment failed says so in its score's outcome, and is never scored as an end. Text is made from
token ids for scoring and for environments only.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.environment_runner import EnvironmentRunner, Finished
from rlhf3d.experience.episode import EpisodeRecord
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.experience.scored import ScoredTrajectory
from rlhf3d.experience.steps import Patience, Phase, Steps, finish, untimed
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.observability.live.waits import waiting_for
from rlhf3d.rewards.manager import RewardManager, ScoringBatch
from rlhf3d.rewards.parts import EnvironmentPart
from rlhf3d.rewards.score import Score, ScoreItem
from rlhf3d.rollout.api import Completion, Engines, Request, complete
from rlhf3d.tokenizer.texts import plain_texts

SCORE_S = 0.5
"""Seconds that a caller with nothing else to do waits at once for scores."""


@dataclass(frozen=True)
class Collector:
    """Asks engines for trajectories and a scorer for what they are worth."""

    engines: Engines
    rewards: RewardManager
    tokenizer: Any
    phase: Phase = untimed
    runner: EnvironmentRunner | None = None
    """Where trajectories meet their environments; null where each is one completion."""
    environment: EnvironmentPart | None = None
    """What the environments' own rewards are worth; null for nothing."""
    patience: Patience = field(default_factory=Patience)
    judged_by: int = 0
    """The share of failures that is too much is one of this many trajectories, where a collection
    has fewer."""

    def collect(self, requests: Sequence[TrajectoryRequest]) -> list[ScoredTrajectory]:
        """Phases `generate` and `score`: one trajectory a request, in their order.

        RewardError where the scoring of too many fails, which `rewards` decides.
        """
        return finish(self.steps(requests), self.phase)

    def steps(self, requests: Sequence[TrajectoryRequest]) -> Steps[list[ScoredTrajectory]]:
        """As `collect`, in steps, the first of which are of `generate`.

        Trajectories go to the scorer as they finish, so that `score` only waits for the last ones.
        """
        judged_by = max(self.judged_by, len(requests))
        scoring = self.rewards.start(len(requests), judged_by)
        finished: dict[int, Finished] = {}
        # Closed where scoring fails: environments end and engines have nothing left to do.
        with closing(self._finished(requests)) as parts:
            for part in parts:
                self._score(part, scoring)
                finished |= part
                yield "generate"
        yield "score"
        while not self._scored_by_now(scoring):
            yield "score"
        # Its ranks are those that train.
        while self.rewards.model is not None and self.patience.background:
            yield "score"
        scores = scoring.finish()
        if self.runner is not None:
            self._check_rewards_are_used(finished.values())
        in_order, next_score = sorted(finished.items()), iter(scores)
        return [self._scored(one, one.failure or next(next_score)) for _, one in in_order]

    def _scored_by_now(self, scoring: ScoringBatch) -> bool:
        """Whether the rule is done; waits for it, but not long."""
        with waiting_for(scoring.waited):
            return scoring.wait(self.patience.of(SCORE_S))

    def _finished(
        self, requests: Sequence[TrajectoryRequest]
    ) -> Generator[dict[int, Finished], None, None]:
        """Trajectories as they finish, by the numbers of their requests; {} where none has."""
        if self.runner is not None:
            judged_by = max(self.judged_by, len(requests))
            yield from self.runner.run(self.engines, requests, self.patience, judged_by)
            return
        asked = {number: _first_turn(request) for number, request in enumerate(requests)}
        with closing(complete(self.engines, asked, self.patience.of)) as parts:
            for part in parts:
                texts = self._decode(part)
                yield {
                    number: Finished(_single_turn(requests[number], completion), texts[number])
                    for number, completion in part.items()
                }

    def _decode(self, completions: Mapping[int, Completion]) -> dict[int, str]:
        """Responses as text, without special tokens; most engines have made it."""
        texts = {number: one.text for number, one in completions.items() if one.text is not None}
        left = {n: one.token_ids for n, one in completions.items() if one.text is None}
        made = plain_texts(self.tokenizer, list(left.values()))
        return texts | dict(zip(left, made, strict=True))

    def _score(self, finished: Mapping[int, Finished], scoring: ScoringBatch) -> None:
        items = {}
        for number, one in finished.items():
            if one.failure is None:
                items[number] = score_item(one.trajectory.prompt, one.text, one.episode)
        scoring.add(items)
        if failed := finished.keys() - items.keys():
            scoring.leave_out(failed)

    def _check_rewards_are_used(self, finished: Iterable[Finished]) -> None:
        """ValueError where environments reward and nobody counts it, or the other way round."""
        ended = [one.episode for one in finished if one.episode is not None and one.failure is None]
        rewarded = any(episode.rewarded for episode in ended)
        if rewarded and self.environment is None:
            raise ValueError(
                "reward.weights: the environment gives rewards, and no part of the reward uses "
                "them; set reward.weights={environment: 1.0}, with accuracy: 1.0 where the answer "
                "is scored too, or {accuracy: 1.0, environment: 0.0} to ignore them"
            )
        # Those that a limit ended may never have come to where it rewards.
        done = sum(episode.end == "done" for episode in ended)
        # Of the few in a part of a batch, perhaps none came there.
        if done and not self.judged_by and not rewarded and self.environment is not None:
            raise ValueError(
                "reward.weights has environment, but the environment gave no reward in any of the "
                f"{done} trajectories that it ended; return one from step (or get_reward), or take "
                "environment out of reward.weights"
            )

    def _scored(self, one: Finished, score: Score) -> ScoredTrajectory:
        if score.unfinished:
            return ScoredTrajectory(one.trajectory, one.text, score, 0.0, episode=one.episode)
        trajectory = one.trajectory
        given = trajectory.turn_reward
        part = self.environment
        # One that could not be scored earns nothing, for its turns neither.
        weight = 0.0 if part is None or score.failed else part.weight
        if given:
            trajectory = trajectory.with_turn_rewards(weight)
        if part is not None and not score.failed:
            score = part.add(score, given)
        reward = score.value + trajectory.turn_reward
        return ScoredTrajectory(trajectory, one.text, score, reward, episode=one.episode)


def _first_turn(request: TrajectoryRequest) -> Request:
    name = request.turn(0, attempt=0)
    return Request(request.prompt.prompt_ids, request.seed, request.sampling, name=name)


def _single_turn(request: TrajectoryRequest, completion: Completion) -> Trajectory:
    """A trajectory of one completion."""
    span = Span("sampled", completion.token_ids, completion.logprobs, completion.versions)
    row = Row(request.prompt.prompt_ids, (span,))
    reason = completion.finish_reason
    return Trajectory(request.prompt, request.group, (row,), reason, request.name)


def score_item(prompt: Prompt, text: str, episode: EpisodeRecord | None = None) -> ScoreItem:
    """What the reward function is asked about a trajectory whose last turn is `text`."""
    item = ScoreItem(
        prompt.data_source,
        text,
        prompt.ground_truth,
        prompt.extra_info,
        prompt.messages,
        prompt.begun,
        prompt.tools,
    )
    if episode is None:
        return item
    return replace(
        item, begun=episode.begun, conversation=episode.messages, environment=episode.record
    )
