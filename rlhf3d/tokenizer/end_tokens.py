"""Which tokens end a completion: all that the tokenizer, generation_config.json and config.json name, and the user's.

Invariant: one set for training, validation and evaluation; where the sources differ, or the chat template ends turns
with none of them, the run says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.paths import read_json

_PROBE = "an answer"


@dataclass(frozen=True)
class EndTokens:
    """What ends a completion, and what the user should know of it."""

    ids: tuple[int, ...]
    notes: tuple[str, ...]


def end_tokens(
    folder: Path | str, tokenizer: Any, vocab_size: int, further: Sequence[int] = ()
) -> EndTokens:
    """The union of what the model's files name, and `further` token ids of the user's.

    Ids that the model cannot generate are left out and named. ValueError naming file and value where it is no token.
    """
    named = {"the tokenizer": _ids("the tokenizer", tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        named[name] = _ids(str(path), read_json(path).get("eos_token_id")) if path.is_file() else ()
    named = {source: ids for source, ids in named.items() if ids}
    every = {*further, *(token for ids in named.values() for token in ids)}
    ids = tuple(sorted(token for token in every if token < vocab_size))
    notes = _differences(named, tokenizer)
    if len(ids) < len(every):
        beyond = ", ".join(str(token) for token in sorted(every - set(ids)))
        notes.append(
            f"end tokens {beyond} are beyond the model's vocabulary of {vocab_size}: it cannot generate them"
        )
    if not ids:
        notes.append(
            "no end token: the model's files name none, so each completion runs to its limit"
        )
    elif (closing := _turn_end(tokenizer)) and not set(closing) & set(ids):
        notes.append(
            f"the chat template ends a turn with {_shown(closing, tokenizer)}, which is none of the end tokens "
            f"({_shown(ids, tokenizer)}): a model trained on that template would not stop; name it as stop token "
            "(rollout.stop_token_ids, evaluate --stop-token-id)"
        )
    return EndTokens(ids, tuple(notes))


def _ids(source: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(
            f"{source}: eos_token_id = {value!r}: it must be a token id, or a list of them"
        )
    return tuple(ids)


def _differences(named: dict[str, tuple[int, ...]], tokenizer: Any) -> list[str]:
    if len({frozenset(ids) for ids in named.values()}) < 2:
        return []
    listed = "; ".join(f"{source} {_shown(ids, tokenizer)}" for source, ids in named.items())
    return [f"end tokens differ ({listed}): each of them ends a completion"]


def _turn_end(tokenizer: Any) -> list[int]:
    """The tokens that the chat template puts after an assistant's answer; none where it renders no such turn."""
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (
        Exception
    ):  # a template may raise anything; prompts that it does not take are refused with their row
        return []
    _, found, after = text.rpartition(_PROBE)
    return list(tokenizer(after, add_special_tokens=False)["input_ids"]) if found else []


def _shown(ids: Iterable[int], tokenizer: Any) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ids)
