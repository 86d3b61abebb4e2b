"""What one step's prompts became: completions, their scores, and the batch that the models train on.

Invariant: the batch holds exactly the token ids the engine wrote; text is made from them for scoring only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.data.loader import Prompt
from rlhf3d.observability.samples import Sample
from rlhf3d.rewards.scoring import Score, ScoreItem
from rlhf3d.rollout.api import Completion, Request, request_seed


@dataclass(frozen=True)
class Experience:
    """N = prompts x n completions, the n of a prompt side by side."""

    prompts: list[Prompt]
    """[N] the prompt of each completion."""
    completions: list[Completion]
    texts: list[str]
    """Responses as text, special tokens left out."""

    def batch(self, pad_id: int) -> Batch:
        """Tokens and rollout log-probs as a batch."""
        return from_sequences(
            [p.prompt_ids for p in self.prompts],
            [c.token_ids for c in self.completions],
            pad_id,
            rollout_logprobs=[c.logprobs for c in self.completions],
        )

    def score_items(self) -> list[ScoreItem]:
        """What the reward function is asked."""
        return [
            ScoreItem(p.data_source, text, p.ground_truth, p.extra_info)
            for p, text in zip(self.prompts, self.texts, strict=True)
        ]

    def samples(self, scores: Sequence[Score]) -> list[Sample]:
        """Records for `samples/`."""
        return [
            Sample(
                prompt=p.text,
                response=text,
                ground_truth=p.ground_truth,
                score=s.value,
                outcome=s.outcome.value,
                length=len(c.token_ids),
                finish_reason=c.finish_reason,
                policy_version=c.policy_version,
            )
            for p, c, text, s in zip(self.prompts, self.completions, self.texts, scores, strict=True)
        ]


def make_requests(prompts: Sequence[Prompt], n: int, seed: int, step: int) -> list[Request]:
    """n requests a prompt, each with its own seed from (run seed, step, prompt, sample)."""
    return [Request(p.prompt_ids, request_seed(seed, step, p.index, sample)) for p in prompts for sample in range(n)]


def make_experience(prompts: Sequence[Prompt], completions: list[Completion], tokenizer: Any) -> Experience:
    """Pair completions with their prompts and decode them."""
    n, rest = divmod(len(completions), len(prompts))
    assert rest == 0, f"{len(completions)} completions of {len(prompts)} prompts"
    texts = tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
    return Experience([p for p in prompts for _ in range(n)], completions, texts)


def group_ids(experience: Experience, n: int) -> Tensor:
    """[N] the number of each row's prompt within the step."""
    return torch.arange(len(experience.completions)) // n
