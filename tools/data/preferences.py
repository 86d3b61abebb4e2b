"""Preference pairs: a prompt, a chosen and a rejected answer, as chat messages.

Invariant: of one file, every `HELD_OUT_EVERY`th pair is held out, by its number: a reward model
trained on the others and prompts prepared for training never meet it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.data.messages import Message, read_messages
from rlhf3d.data.sources import read_rows

HELD_OUT_EVERY = 5
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = list[Message]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    prompt: Messages
    chosen: str
    rejected: str


def is_held_out(number: int) -> bool:
    """Whether the pair with this number in its file is for tests alone."""
    return number % HELD_OUT_EVERY == 0


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a jsonl, json, parquet or arrow file.

    Raises ValueError that names file and row.
    """
    return [pair_of(row, f"{path}: row {number}") for number, row in enumerate(read_rows(path))]


def pair_of(row: Mapping[str, Any], where: str) -> Pair:
    """A row {prompt, chosen, rejected} as a pair.

    Answers are texts, or complete conversations that begin with the prompt.
    """
    answers = [row.get(key) for key in ("chosen", "rejected")]
    prompt = row.get("prompt")
    if all(isinstance(answer, list) and answer for answer in answers):
        # Complete conversations: the last message is the answer, all before it the prompt.
        chosen_talk, rejected_talk = (
            read_messages(answer, f"{where}: answer") for answer in answers
        )
        if chosen_talk[:-1] != rejected_talk[:-1]:
            raise ValueError(
                f"{where}: chosen and rejected differ before their last message: a pair has one "
                "prompt"
            )
        before = chosen_talk[:-1]
        prompt = before if prompt is None else prompt
        if len(before) > len(prompt_messages(prompt, where)):
            raise ValueError(
                f"{where}: the answers hold turns that the prompt lacks; put them into it"
            )
        answers = [chosen_talk[-1]["content"], rejected_talk[-1]["content"]]
    chosen, rejected = answers
    if prompt is None or not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(
            f"{where} needs prompt, chosen and rejected as text or messages, has "
            f"{', '.join(sorted(row))}"
        )
    return Pair(prompt_messages(prompt, where), chosen.strip(), rejected.strip())


def prompt_messages(prompt: Any, where: str) -> Messages:
    """Messages as they are, a text as the user's.

    Of `Human: … Assistant:` dialogues, their turns.
    """
    if isinstance(prompt, list):
        return read_messages(prompt, where)
    if not isinstance(prompt, str):
        raise ValueError(
            f"{where}: prompt must be text or messages, not {type(prompt).__name__} "
            f"{str(prompt)[:80]!r}"
        )
    pieces = _TURN.split(prompt)
    # No Human: or Assistant: in it. The pattern's group puts names at odd places, texts after them.
    if len(pieces) == 1:
        return [{"role": "user", "content": prompt.strip()}]
    turns = [(name, text.strip()) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)]
    # The end of a dialogue asks for the answer.
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    if not turns or turns[-1][0] != "Human" or pieces[0].strip():
        raise ValueError(
            f"{where}: a dialogue must begin with Human: and end with Human's turn and Assistant:"
        )
    return [{"role": _ROLES[name], "content": text} for name, text in turns]
