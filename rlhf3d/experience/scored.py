"""Trajectories with what they are worth, and the batch that the models train on.

Invariant: the batch holds exactly the token ids that the engine wrote; which rows are compared with
each other is its column `group_ids`, never a row's position. Shapes: T trajectories, N rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.data.messages import last_request
from rlhf3d.experience.episode import EpisodeRecord
from rlhf3d.experience.trajectory import Row, Trajectory
from rlhf3d.observability.samples import Sample
from rlhf3d.rewards.score import Score
from rlhf3d.rewards.truths import shown


@dataclass(frozen=True)
class ScoredTrajectory:
    """One trajectory with its score."""

    trajectory: Trajectory
    text: str
    """The response without special tokens: for scoring and for people, never trained on."""
    score: Score
    """As the reward function gave it."""
    reward: float
    """All that is trained on, by which a group is compared: the rewards of its turns, the score of
    its end, and the overlong penalty."""
    greedy_reward: float | None = None
    """Reward of the greedy answer to the same prompt, where the estimator subtracts it (ReMax)."""
    episode: EpisodeRecord | None = None
    """What is known besides, of a trajectory with an environment."""

    @property
    def end_reward(self) -> float:
        """What is left of `reward` for the last sampled token, without the rewards of turns."""
        # A turn without tokens has none to carry its reward: that stays with the end's.
        turns = [span for span in self.trajectory.turns if span.token_ids]
        return self.reward - sum(span.reward for span in turns)

    def metric(self, name: str) -> float:
        """`acc` (what the reward function returned as such, else its score), `score`, `seq_reward`,
        `seq_final_reward`.
        """
        if name in ("seq_reward", "seq_final_reward"):
            return self.reward
        if name == "acc":
            return self.score.accuracy
        return self.score.value + self.trajectory.turn_reward

    def sample(self) -> Sample:
        """Its record in `samples/`."""
        trajectory, episode = self.trajectory, self.episode
        prompt, turns = trajectory.prompt.text, []
        if episode is not None:
            # What reset added is a part of what was asked.
            prompt = last_request(episode.messages[: episode.first_turn]) or prompt
            turns = [dict(message) for message in episode.messages[episode.first_turn :]]
        return Sample(
            prompt=prompt,
            response=self.text,
            ground_truth=shown(trajectory.prompt.ground_truth),
            score=self.score.value + trajectory.turn_reward,
            outcome=self.score.outcome.value,
            length=trajectory.response_length,
            finish_reason=trajectory.finish_reason,
            # One that failed may have no turn yet.
            policy_version=trajectory.newest_version if trajectory.turns else -1,
            turns=turns,
            answer=self.score.answer,
        )


@dataclass(frozen=True)
class Experience:
    """What one step trains on: T scored trajectories, which are N rows of the batch."""

    trajectories: Sequence[ScoredTrajectory]
    metrics: dict[str, float] = field(default_factory=dict)
    """What the source reports of how it made them."""
    left_out: Sequence[ScoredTrajectory] = ()
    """Those of groups in which one came to no end: counted, and else of no consequence."""
    drawn: Sequence[int] = ()
    """Response tokens of every trajectory that came to its end since the step before, those that
    are trained on later or never included; empty where that is `trajectories` and `left_out`."""
    ended: Sequence[int] = ()
    """Numbers of the groups that came to their end since the step before, in order, where that
    depends on the time."""

    @property
    def samples(self) -> list[Sample]:
        """Records of all that is trained on, in order, then of those that came to no end."""
        failed = [scored for scored in self.left_out if scored.score.unfinished]
        return [scored.sample() for scored in (*self.trajectories, *failed)]

    @property
    def group_ids(self) -> Tensor:
        """[T] equal within a group; group numbers need not be consecutive."""
        return torch.tensor([scored.trajectory.group for scored in self.trajectories])

    @property
    def rewards(self) -> Tensor:
        """[T] see `ScoredTrajectory.reward`."""
        return torch.tensor([scored.reward for scored in self.trajectories], dtype=torch.float32)

    @property
    def lengths(self) -> Tensor:
        """[T] tokens after the prompts of its rows, of every author."""
        return torch.tensor([scored.trajectory.response_length for scored in self.trajectories])

    @property
    def all_lengths(self) -> list[int]:
        """Tokens as `lengths` has them, of those that are left out too."""
        together = (*self.trajectories, *self.left_out)
        return [scored.trajectory.response_length for scored in together]

    @property
    def written(self) -> Tensor:
        """[T] False for empty responses: those in which the policy wrote no token."""
        written = [scored.trajectory.sampled_length > 0 for scored in self.trajectories]
        return torch.tensor(written, dtype=torch.bool)

    def metric(self, name: str) -> Tensor:
        """[T] see `ScoredTrajectory.metric`."""
        values = [scored.metric(name) for scored in self.trajectories]
        return torch.tensor(values, dtype=torch.float32)

    def batch(self, pad_id: int) -> Batch:
        """Tokens [N, S], mask and log-probs of the engine [N, R]; of each row [N] `group_ids`,
        `rewards`, and `sequence`, its trajectory's number in the step and in its samples.

        Rows of a trajectory follow each other in order, so that a batch in which some have several
        gets `trajectory_ids` [N]. `rewards` are of trajectories' ends: on the last row of each, 0
        on the rows before it. Where an environment rewarded a turn, `turn_rewards` [N, R] have it
        on the turn's last token. ReMax adds `greedy_rewards` [N], the same on all rows of a
        trajectory.
        """
        rows: list[Row] = []
        owners: list[int] = []
        for number, scored in enumerate(self.trajectories):
            rows += scored.trajectory.rows
            owners += [number] * len(scored.trajectory.rows)
        batch = _tokens(rows, pad_id)
        owner = torch.tensor(owners)
        columns = {"sequence": owner, "group_ids": self.group_ids[owner]}
        # A row is its trajectory's last where the next row has another owner.
        last = torch.tensor([*owners, -1]).diff() != 0
        ends = torch.tensor(
            [scored.end_reward for scored in self.trajectories], dtype=torch.float32
        )
        columns["rewards"] = ends[owner].masked_fill(~last, 0.0)
        if len(rows) > len(self.trajectories):
            columns["trajectory_ids"] = owner
        # One for every trajectory or for none (`source` adds them to all).
        greedy = [s.greedy_reward for s in self.trajectories if s.greedy_reward is not None]
        if greedy:
            columns["greedy_rewards"] = torch.tensor(greedy, dtype=torch.float32)[owner]
        return batch.with_columns(**columns)


def _tokens(rows: Sequence[Row], pad_id: int) -> Batch:
    """What the rows themselves hold."""
    per_token: dict[str, Sequence[array]] = {
        # Replaces the default mask, which counts every token after the prompt as trained on.
        "response_mask": [row.response_mask for row in rows],
        "rollout_logprobs": [row.logprobs for row in rows],
    }
    turns = chain.from_iterable(row.turns for row in rows)
    if any(span.reward for span in turns):
        per_token["turn_rewards"] = [row.turn_rewards for row in rows]
    prompts = [row.prompt_ids for row in rows]
    return from_sequences(prompts, [row.response_ids for row in rows], pad_id, **per_token)
