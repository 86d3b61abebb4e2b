"""What a reward model reads, and how its scores enter the reward.

Invariant: every input is at most `limit` tokens, and one that was cut is marked, or the run stops;
its last token is the one that transformers takes the score of. An item without the rule's verdict
stays as it is; the model's score stands in `Score.extra["reward_model"]`, before normalization and
weight. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlhf3d.rewards.score import MODEL_PART as PART
from rlhf3d.rewards.score import Outcome, RewardError, Score, ScoreItem
from rlhf3d.tokenizer.chat import ChatTokenizer
from rlhf3d.tokenizer.clock import TEMPLATE_CLOCK


@dataclass(frozen=True)
class ModelScore:
    """A reward model's score of one completion."""

    value: float
    cut: bool = False
    """Whether its input was cut to the model's limit."""


class ScoreModel(Protocol):
    """A reward model."""

    def scores(self, items: Sequence[ScoreItem]) -> list[ModelScore]:
        """One for each item; RewardError where one is not finite, or an item cannot be read."""


@dataclass(frozen=True)
class ModelPart:
    """How a reward model's score enters the reward: weight x (score - mean) / std."""

    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def add(self, score: Score | None, model_score: ModelScore) -> Score:
        """The rule's score (null where there is no rule) and the model's part."""
        part = self.weight * (model_score.value - self.mean) / self.std
        extra = {PART: model_score.value, f"{PART}_cut": model_score.cut}
        if score is None:
            return Score(part, Outcome.SCORED, extra)
        # Without the rule's verdict, the model's score alone would be a reward on another scale.
        if score.failed:
            return score
        extra = {**score.extra, **extra, "acc": score.accuracy}
        return replace(score, value=score.value + part, extra=extra)


def only_model(scores: Sequence[Score]) -> bool:
    """Whether the scores are a reward model's alone: there is no right or wrong in them."""
    return bool(scores) and all(PART in s.extra and "acc" not in s.extra for s in scores)


@dataclass(frozen=True)
class ModelInput:
    """One conversation."""

    ids: tuple[int, ...]
    cut: bool = False
    """Whether its first tokens were left out."""


def model_inputs(
    items: Sequence[ScoreItem],
    tokenizer: ChatTokenizer,
    limit: int,
    overlong: str,
    pad_id: int | None,
    vocab_size: int | None = None,
) -> list[ModelInput]:
    """The conversations as token ids, in the reward model's own chat template.

    RewardError for an input over `limit` tokens where `overlong` is error, for one with a token
    beyond the model's `vocab_size`, and for a prompt that the template refuses.
    """
    inputs = []
    for item in items:
        ids = _conversation(item, tokenizer)
        if vocab_size is not None and max(ids, default=0) >= vocab_size:
            raise RewardError(
                f"reward model: token {max(ids)} of {_shown(item)}, but it has embeddings for 0 to "
                f"{vocab_size - 1}: reward_model.path's tokenizer and model do not belong together"
            )
        # transformers' classifiers take the output at the last token that is not padding, also
        # where a template ends in that token.
        while len(ids) > 1 and ids[-1] == pad_id:
            ids = ids[:-1]
        if len(ids) > limit and overlong == "error":
            raise RewardError(
                f"reward model: {len(ids)} tokens, more than reward_model.max_length = {limit}, of "
                f"{_shown(item)}; raise it, shorten data.max_prompt_length or "
                "data.max_response_length, or set reward_model.overlong=truncate_left"
            )
        # The end stays: the completion is there, and the token that the score is taken at.
        inputs.append(ModelInput(ids[-limit:], cut=len(ids) > limit))
    return inputs


def _conversation(item: ScoreItem, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The prompt and the completion, as the assistant's message or the end of its last one; of a
    trajectory with an environment all turns.
    """
    options: dict[str, Any] = {"tools": list(item.tools)} if item.tools else {}
    # The same date in every step of a run, as in the policy's prompts.
    options["strftime_now"] = TEMPLATE_CLOCK.now().strftime
    try:
        return tuple(
            tokenizer.apply_chat_template(
                item.all_messages, add_generation_prompt=False, return_dict=False, **options
            )
        )
    except Exception as error:  # a template may raise anything
        raise RewardError(
            f"reward_model.path's chat template does not take {_shown(item)}: {error}; use prompts "
            "that it takes"
        ) from error


def require_finite(items: Sequence[ScoreItem], scores: Sequence[float]) -> None:
    """RewardError that names the first completion whose score is NaN or infinite."""
    broken = [number for number, score in enumerate(scores) if not math.isfinite(score)]
    if broken:
        first = broken[0]
        raise RewardError(
            f"the reward model gave {scores[first]} for {_shown(items[first])} ({len(broken)} of "
            f"{len(items)} scores are not finite); check the model folder, or use "
            "model.dtype=float32"
        )


def _shown(item: ScoreItem) -> str:
    question = item.messages[-1]["content"] if item.messages else ""
    return (
        f"prompt {question[:200]!r} of {item.data_source} with completion "
        f"{item.solution_str[:200]!r}"
    )
