"""MATH-500: the test problems of MATH that "Let's Verify Step by Step" held out, for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf3d.data.rows import PromptRow
from rlhf3d.data.sets import math

DATA_SOURCE = "HuggingFaceH4/MATH-500"
SCORER = math.SCORER
HUB = ("HuggingFaceH4/MATH-500", "default")
SPLITS = ("test",)


def make_map_fn(
    split: str, suffix: str = math.SUFFIX
) -> Callable[[Mapping[str, Any], int], PromptRow]:
    """As MATH's: {problem, solution, answer, subject or type, level}."""
    return math.make_map_fn(split, suffix, DATA_SOURCE)
