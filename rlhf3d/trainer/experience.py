"""What one step's prompts became: completions, their scores, and the batch that the models train on.

Invariant: the batch holds exactly the token ids the engine wrote; text is made from them for scoring only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.data.loader import Prompt
from rlhf3d.observability.samples import Sample
from rlhf3d.rewards.score import Score
from rlhf3d.rewards.truths import shown
from rlhf3d.rollout.api import Completion, Request, request_seed


@dataclass(frozen=True)
class Experience:
    """N = prompts x n completions, the n of a prompt side by side."""

    prompts: list[Prompt]
    """[N] the prompt of each completion."""
    completions: list[Completion]
    texts: list[str]
    """Responses as text, special tokens left out."""
    greedy: Experience | None = None
    """One greedy completion of each prompt, where the estimator compares with it (ReMax); not trained on."""

    @property
    def response_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(len(c.token_ids) for c in self.completions)

    def batch(self, pad_id: int) -> Batch:
        """Tokens and rollout log-probs as a batch; `sequence` is each row's number in the step and in its samples."""
        batch = from_sequences(
            [p.prompt_ids for p in self.prompts],
            [c.token_ids for c in self.completions],
            pad_id,
            rollout_logprobs=[c.logprobs for c in self.completions],
        )
        return batch.with_columns(sequence=torch.arange(len(batch)))

    def samples(self, scores: Sequence[Score]) -> list[Sample]:
        """Records for `samples/`."""
        return [
            Sample(
                prompt=p.text,
                response=text,
                ground_truth=shown(p.ground_truth),
                score=s.value,
                outcome=s.outcome.value,
                length=len(c.token_ids),
                finish_reason=c.finish_reason,
                policy_version=c.policy_version,
            )
            for p, c, text, s in zip(
                self.prompts, self.completions, self.texts, scores, strict=True
            )
        ]


@dataclass(frozen=True)
class Scored:
    """Completions with what they are worth."""

    experience: Experience
    scores: list[Score]
    """[N] as the reward function gave them."""
    rewards: Tensor
    """[N] scores and overlong penalty, what is trained on."""
    greedy_rewards: Tensor | None = None
    """[N] the same of the greedy completion of each row's prompt."""

    @property
    def written(self) -> Tensor:
        """[N] False for empty responses."""
        return torch.tensor([len(c.token_ids) > 0 for c in self.experience.completions])

    def metric(self, name: str) -> Tensor:
        """[N] acc (what the reward function returned as `acc`, else its score), score, seq_reward, seq_final_reward."""
        if name in ("seq_reward", "seq_final_reward"):
            return self.rewards
        return torch.tensor(
            [s.accuracy if name == "acc" else s.value for s in self.scores], dtype=torch.float32
        )

    def take(self, groups: Iterable[int], n: int) -> Scored:
        """The given groups of n completions, in the given order."""
        rows = [group * n + i for group in groups for i in range(n)]
        e = self.experience
        return Scored(
            Experience(
                [e.prompts[r] for r in rows],
                [e.completions[r] for r in rows],
                [e.texts[r] for r in rows],
            ),
            [self.scores[r] for r in rows],
            self.rewards[rows],
            None if self.greedy_rewards is None else self.greedy_rewards[rows],
        )


def join(parts: Sequence[Scored]) -> Scored:
    """One after the other."""
    greedy = [part.greedy_rewards for part in parts if part.greedy_rewards is not None]
    return Scored(
        Experience(
            [prompt for part in parts for prompt in part.experience.prompts],
            [completion for part in parts for completion in part.experience.completions],
            [text for part in parts for text in part.experience.texts],
        ),
        [score for part in parts for score in part.scores],
        torch.cat([part.rewards for part in parts]),
        torch.cat(greedy) if greedy else None,
    )


def make_requests(
    prompts: Sequence[Prompt], n: int, seed: int, step: int, seen: Counter[int] | None = None
) -> list[Request]:
    """n requests a prompt, each with its own seed from (run seed, step, prompt, sample).

    `seen` counts how often the step has asked for each prompt, and is counted up: a prompt that comes again gets
    new samples, not the old ones.
    """
    seen = Counter() if seen is None else seen
    requests = []
    for p in prompts:
        first = seen[p.index] * n
        seen[p.index] += 1
        requests += [
            Request(p.prompt_ids, request_seed(seed, step, p.index, first + sample))
            for sample in range(n)
        ]
    return requests


def make_experience(
    prompts: Sequence[Prompt], completions: Mapping[int, Completion], texts: Mapping[int, str]
) -> Experience:
    """Completions and their texts, by row, with their prompts."""
    n, rest = divmod(len(completions), len(prompts))
    assert rest == 0, f"{len(completions)} completions of {len(prompts)} prompts"
    rows = range(len(completions))
    return Experience(
        [prompts[row // n] for row in rows],
        [completions[row] for row in rows],
        [texts[r] for r in rows],
    )


def group_ids(experience: Experience, n: int) -> Tensor:
    """[N] the number of each row's prompt within the step."""
    return torch.arange(len(experience.completions)) // n
