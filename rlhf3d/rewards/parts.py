r"""The form of a completion as a part of its reward, and the sum of the parts by weights.

Invariant: what a part is worth is stated in a completion's `Score.extra` under its name, `acc` stays the answer's own
score, and a completion that could not be scored earns nothing for its form. Its length is `reward.overlong_buffer`'s,
which the trainer takes off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf3d.rewards.function import RewardFunction, score_items
from rlhf3d.rewards.math_answer import last_boxed
from rlhf3d.rewards.score import ExtraInfo, Score, ScoreItem

FORMATS = ("boxed", "hashes", "think")
PARTS = ("accuracy", "format")
_THINK = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*(?!</?think>)\S(?:(?!</?think>).)*",
    re.DOTALL,
)
_BEGUN = {"think": re.compile(r"<think>.*", re.DOTALL), "boxed": re.compile(r"\\boxed\s*\{[^{}]*$")}
"""What of a form the prompt's end may hold: the model goes on with it."""
_HASHES = re.compile(r"####\s*-?\$?[0-9][0-9.,]*")


def format_score(text: str, form: str, begun: str = "") -> float:
    r"""1.0 where `text` has the form: one `\boxed{}` answer, one after `####`, or one `<think>` block and then text.

    `begun` is what the prompt's end holds of the answer, where a template opens `<think>`, or closes it again.
    """
    if form in _BEGUN and (opened := _BEGUN[form].search(begun)):
        text = opened[0] + text
    if form == "hashes" and begun.rstrip().endswith("####"):
        text = "####" + text
    if form == "boxed":
        return float(text.count("\\boxed") == 1 and bool(last_boxed(text)))
    if form == "hashes":
        return float(text.count("####") == 1 and _HASHES.search(text) is not None)
    if form == "think":
        return float(_THINK.fullmatch(text) is not None)
    raise ValueError(f"reward.format: no {form!r}; choose one of {', '.join(FORMATS)}")


class WeightedReward:
    """Sum of parts by `weights`; `base` scores the answer."""

    def __init__(self, base: RewardFunction, weights: dict[str, float], form: str) -> None:
        for name in weights:
            if name not in PARTS:
                raise ValueError(f"reward.weights: no part {name!r}; there are {', '.join(PARTS)}")
        format_score("", form)
        self._base, self._weights, self._form = base, weights, form
        self.chunk_size = getattr(base, "chunk_size", 1)
        self.memory_gib = getattr(base, "memory_gib", None)

    def prepare(self) -> None:
        """As the base."""
        getattr(self._base, "prepare", lambda: None)()

    def __call__(
        self,
        *,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: ExtraInfo = None,
    ) -> Score:
        return self.score_items(
            [ScoreItem(data_source, solution_str, ground_truth, extra_info or {})]
        )[0]

    def score_items(self, items: Sequence[ScoreItem]) -> list[Score]:
        """Score each item."""
        return [
            self._add(item, score)
            for item, score in zip(items, score_items(self._base, items), strict=True)
        ]

    def _add(self, item: ScoreItem, score: Score) -> Score:
        if score.failed:
            return score
        parts = {
            "accuracy": score.accuracy,
            "format": format_score(item.solution_str, self._form, item.begun),
        }
        value = sum(self._weights.get(name, 0.0) * part for name, part in parts.items())
        extra = {**score.extra, **parts, "acc": parts["accuracy"]}
        return replace(score, value=value, extra=extra)  # one without an answer stays unparsable
