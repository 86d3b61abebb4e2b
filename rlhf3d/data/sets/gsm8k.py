"""gsm8k's questions as prompt rows, with the prompt suffix and ground truth that verl uses.

Invariant: the ground truth is the number after the answer's last `####`, without commas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf3d.data.rows import PromptRow

DATA_SOURCE = "openai/gsm8k"
SCORER = "gsm8k"
HUB = ("openai/gsm8k", "main")
SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
_FINAL_ANSWER = re.compile(r"####\s*\$?(-?[0-9][0-9.,]*)")


def ground_truth(answer: str) -> str:
    """The number after the last `####` of a worked answer; ValueError where there is none."""
    found = _FINAL_ANSWER.findall(answer)
    if not found:
        raise ValueError(f"no `#### number` in the answer {answer[-80:]!r}")
    # The pattern takes a sentence's final period for a part of the number.
    return str(found[-1]).replace(",", "").rstrip(".")


def make_row(
    data_source: str,
    question: str,
    answer: str,
    suffix: str,
    extra_info: Mapping[str, Any],
    preamble: Sequence[Mapping[str, str]] = (),
) -> PromptRow:
    """One question in gsm8k's row format, after the chat messages of `preamble`.

    `extra_info` is put before the question and answer.
    """
    return PromptRow(
        data_source=data_source,
        prompt=[*map(dict, preamble), {"role": "user", "content": f"{question} {suffix}".strip()}],
        ability="math",
        reward_model={"ground_truth": ground_truth(answer), "style": "rule"},
        extra_info={**extra_info, "question": question, "answer": answer},
    )


def make_map_fn(split: str, suffix: str = SUFFIX) -> Callable[[Mapping[str, Any], int], PromptRow]:
    """A function from a gsm8k example {question, answer} and its index to a row of `split`.

    It raises ValueError for an example without either, or without a final answer.
    """

    def to_row(example: Mapping[str, Any], index: int) -> PromptRow:
        question, answer = example.get("question"), example.get("answer")
        if not isinstance(question, str) or not question.strip() or not isinstance(answer, str):
            raise ValueError(f"it needs a question and an answer, has {', '.join(sorted(example))}")
        return make_row(DATA_SOURCE, question, answer, suffix, {"split": split, "index": index})

    return to_row
