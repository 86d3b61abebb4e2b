"""From completions to what the reward function is asked: text, and what the prompt's row says about the answer.

Invariant: text is made of token ids for scoring only; what is trained on are the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf3d.data.dataset import Prompt
from rlhf3d.rewards.score import ScoreItem
from rlhf3d.rollout.api import Completion


def decode(completions: Mapping[int, Completion], tokenizer: Any) -> dict[int, str]:
    """Responses as text, under the same numbers, special tokens left out."""
    texts = tokenizer.batch_decode(
        [list(c.token_ids) for c in completions.values()], skip_special_tokens=True
    )
    return dict(zip(completions, texts, strict=True))


def score_item(prompt: Prompt, text: str) -> ScoreItem:
    """What the reward function is asked about a response."""
    return ScoreItem(
        prompt.data_source,
        text,
        prompt.ground_truth,
        prompt.extra_info,
        prompt.messages,
        prompt.begun,
        prompt.tools,
    )
