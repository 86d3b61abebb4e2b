"""LIMR's 1,389 training problems (Li et al., 2025): prompt and answer, without solutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf3d.data.rows import PromptRow
from rlhf3d.data.sets.math import SUFFIX

DATA_SOURCE = "GAIR/LIMR"
SCORER = "math_verify"
HUB = ("GAIR/LIMR", "default")
SPLITS = ("train",)
EXCLUDE = ("math500",)
NOTES = (
    "LIMR is contaminated: 502 of its 1,389 problems are MATH *test* problems. Never report MATH's "
    "test split after training on it; evaluate on MATH-500 and leave its problems out with "
    "--exclude math500/test.parquet.",
    "LIMR states no license.",
)


def make_map_fn(split: str, suffix: str = SUFFIX) -> Callable[[Mapping[str, Any], int], PromptRow]:
    """A function from a LIMR row {prompt, answer, source} and its index to a row of `split`."""

    def to_row(row: Mapping[str, Any], index: int) -> PromptRow:
        problem, answer = row.get("prompt"), row.get("answer")
        has_problem = isinstance(problem, str) and problem.strip()
        if not has_problem or answer is None or not str(answer).strip():
            raise ValueError(f"it needs a prompt and an answer, has {', '.join(sorted(row))}")
        return PromptRow(
            data_source=DATA_SOURCE,
            prompt=[{"role": "user", "content": f"{problem} {suffix}".strip()}],
            ability="math",
            reward_model={"style": "rule", "ground_truth": str(answer)},
            extra_info={
                "split": split,
                "index": index,
                "origin": str(row.get("source") or ""),
                "question": problem,
            },
        )

    return to_row
