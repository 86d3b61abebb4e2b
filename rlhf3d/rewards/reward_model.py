"""What a reward model reads, and how its scores enter the reward.

Invariant: every input is at most `limit` tokens, and one that was cut is marked or the run stops; the last token is the
one that transformers takes the score of. An item that the rule gave no verdict on stays as it is, and what the model
said stands in `Score.extra["reward_model"]`, before normalization and weight. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rlhf3d.rewards.score import MODEL_PART as PART
from rlhf3d.rewards.score import Outcome, RewardError, Score, ScoreItem
from rlhf3d.tokenizer.chat import ChatTokenizer

OVERLONG = ("error", "truncate_left")


@dataclass(frozen=True)
class ModelScore:
    """What a reward model says of one completion."""

    value: float
    cut: bool = False
    """Whether its input was cut to the model's limit."""


class ScoreModel(Protocol):
    """A reward model."""

    def scores(self, items: Sequence[ScoreItem]) -> list[ModelScore]:
        """One for each item; raises where one is not finite."""


@dataclass(frozen=True)
class ModelPart:
    """How a reward model's score enters the reward: weight x (score - mean) / std."""

    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def add(self, score: Score | None, said: ModelScore) -> Score:
        """`score` of the rule (null: there is none) with the model's part."""
        part = self.weight * (said.value - self.mean) / self.std
        extra = {PART: said.value, f"{PART}_cut": said.cut}
        if score is None:
            return Score(part, Outcome.SCORED, extra)
        if score.failed:
            return score
        return replace(
            score, value=score.value + part, extra={**score.extra, **extra, "acc": score.accuracy}
        )


def only_model(scores: Sequence[Score]) -> bool:
    """Whether the scores are a reward model's alone: there is no right or wrong in them."""
    return bool(scores) and all(
        PART in score.extra and "acc" not in score.extra for score in scores
    )


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
    """The conversations as token ids.

    The completion's text is the assistant's message after the prompt's, or goes on with its last one. Trailing
    `pad_id` are dropped: transformers' classifiers take the output at the last token that is not padding, also where a
    template ends in that token.
    RewardError for an input over `limit` tokens where `overlong` is error, for one with a token beyond the model's
    `vocab_size`, and for a prompt the template refuses.
    """
    inputs = []
    for item in items:
        messages = [*item.messages]
        own = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
        messages.append({"role": "assistant", "content": own + item.solution_str})
        try:
            ids = tuple(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=False, return_dict=False
                )
            )
        except Exception as error:  # a template may raise anything
            raise RewardError(
                f"reward_model.path's chat template does not take {_shown(item)}: {error}; use prompts that it takes"
            ) from error
        if vocab_size is not None and max(ids, default=0) >= vocab_size:
            raise RewardError(
                f"reward model: token {max(ids)} of {_shown(item)}, but it has embeddings for 0 to {vocab_size - 1}: "
                "reward_model.path's tokenizer and model do not belong together"
            )
        while len(ids) > 1 and ids[-1] == pad_id:
            ids = ids[:-1]
        if len(ids) > limit and overlong == "error":
            raise RewardError(
                f"reward model: {len(ids)} tokens, more than reward_model.max_length = {limit}, of {_shown(item)}; "
                "raise it, shorten data.max_prompt_length or data.max_response_length, or set "
                "reward_model.overlong=truncate_left"
            )
        inputs.append(ModelInput(ids[-limit:], cut=len(ids) > limit))
    return inputs


def require_finite(items: Sequence[ScoreItem], scores: Sequence[float]) -> None:
    """RewardError that names the first completion whose score is NaN or infinite."""
    broken = [i for i, score in enumerate(scores) if not float("-inf") < score < float("inf")]
    if broken:
        first = broken[0]
        raise RewardError(
            f"the reward model gave {scores[first]} for {_shown(items[first])} ({len(broken)} of {len(items)} scores "
            "are not finite); check the model folder, or use model.dtype=float32"
        )


def _shown(item: ScoreItem) -> str:
    asked = item.messages[-1]["content"] if item.messages else ""
    return (
        f"prompt {asked[:200]!r} of {item.data_source} with completion {item.solution_str[:200]!r}"
    )
