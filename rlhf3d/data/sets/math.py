r"""MATH's problems (Hendrycks et al., 2021), with the instruction and ground truth that verl uses.

Invariant: the ground truth is the content of the solution's last `\boxed{…}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf3d.data.boxed import last_boxed
from rlhf3d.data.rows import PromptRow

DATA_SOURCE = "DigitalLearningGmbH/MATH-lighteval"
ALIASES = ("lighteval/MATH",)
SCORER = "math_verify"
HUB = ("DigitalLearningGmbH/MATH-lighteval", "default")
SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."


def make_map_fn(
    split: str, suffix: str = SUFFIX, data_source: str = DATA_SOURCE
) -> Callable[[Mapping[str, Any], int], PromptRow]:
    """A function from a MATH row {problem, solution, level, type} and its index to a prompt row.

    It raises ValueError for a row without a problem, or whose solution has no boxed answer.
    """

    def to_row(row: Mapping[str, Any], index: int) -> PromptRow:
        problem, solution = row.get("problem"), row.get("solution")
        if not isinstance(problem, str) or not problem.strip() or not isinstance(solution, str):
            raise ValueError(f"it needs a problem and a solution, has {', '.join(sorted(row))}")
        answer = row.get("answer") or last_boxed(solution)
        if not answer:
            raise ValueError("its solution has no \\boxed{answer}")
        extra = {
            "level": str(row.get("level") or ""),
            "type": str(row.get("type") or row.get("subject") or ""),
        }
        return PromptRow(
            data_source=data_source,
            prompt=[{"role": "user", "content": f"{problem} {suffix}".strip()}],
            ability="math",
            reward_model={"style": "rule", "ground_truth": str(answer)},
            extra_info={
                "split": split,
                "index": index,
                **extra,
                "question": problem,
                "answer": solution,
            },
        )

    return to_row
