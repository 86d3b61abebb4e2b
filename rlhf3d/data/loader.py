"""From parquet to batches of token ids, in an order that a checkpoint can resume exactly.

Invariant: the prompts of a run are a function of (files, tokenizer, seed, batch size) and the position
alone; each epoch serves every kept prompt exactly once, and every prompt left out is counted.
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf3d.data.rows import PromptRow, read_parquet

OVERLONG = ("error", "filter", "truncate_left")


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Token ids of a conversation."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenised, and what its completions are scored with."""

    prompt_ids: tuple[int, ...]
    """Token ids, chat template and generation prompt included."""
    data_source: str
    ground_truth: Any
    """As in the file: text for the built-in scorers."""
    extra_info: dict[str, Any]
    index: int
    """Number of the row, counted through all the files."""
    text: str
    """The last message, for people to read."""


class PromptDataset(Sequence[Prompt]):
    """The prompts of some parquet files, tokenised once.

    `overlong` says what to do with prompts over `max_prompt_length` tokens: error, filter (left out and
    counted in `dropped`) or truncate_left (the last tokens are kept). `max_samples` reads only the first
    rows; -1 for all. Errors are ValueErrors that name `key`.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: ChatTokenizer,
        max_prompt_length: int,
        overlong: str = "error",
        max_samples: int = -1,
        key: str = "data.train_files",
    ) -> None:
        if overlong not in OVERLONG:
            raise ValueError(f"data.overlong_prompts: no {overlong!r}; choose one of {', '.join(OVERLONG)}")
        if not files:
            raise ValueError(f"{key}: no files named; give one or more parquet files of prompts")
        rows = [(f"{path} row {i}", row) for path in files for i, row in enumerate(read_parquet(path))]
        rows = rows if max_samples < 0 else rows[:max_samples]
        tokenised = [_tokenise(tokenizer, row, f"{key}: {where}") for where, row in rows]
        too_long = [i for i, ids in enumerate(tokenised) if len(ids) > max_prompt_length]
        if too_long and overlong == "error":
            raise ValueError(_overlong_message(key, rows[too_long[0]][0], tokenised, max_prompt_length))
        skipped = set(too_long) if overlong == "filter" else set()
        self.dropped = len(skipped)
        self._prompts = [
            _prompt(row, tokenised[i][-max_prompt_length:], i) for i, (_, row) in enumerate(rows) if i not in skipped
        ]
        if not self._prompts:
            raise ValueError(
                f"{key}: no prompt left of {len(rows)} rows ({self.dropped} over data.max_prompt_length="
                f"{max_prompt_length}); raise data.max_prompt_length or name other files"
            )

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        return self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    @property
    def data_sources(self) -> list[str]:
        """The distinct data sources, sorted."""
        return sorted({prompt.data_source for prompt in self._prompts})

    def fingerprint(self) -> str:
        """A digest of all token ids and ground truths in order."""
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(array("q", (len(prompt.prompt_ids), *prompt.prompt_ids)).tobytes())
            digest.update(repr(prompt.ground_truth).encode())
        return digest.hexdigest()


def _prompt(row: PromptRow, ids: tuple[int, ...], index: int) -> Prompt:
    text = row.prompt[-1]["content"]
    return Prompt(ids, row.data_source, row.reward_model["ground_truth"], row.extra_info, index, text)


def _tokenise(tokenizer: ChatTokenizer, row: PromptRow, where: str) -> tuple[int, ...]:
    try:
        ids = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template may raise anything; without the row nobody could find the cause
        raise ValueError(f"{where}: model.path's chat template does not take this prompt: {error}") from error
    return tuple(ids)


def _overlong_message(key: str, first: str, tokenised: list[tuple[int, ...]], limit: int) -> str:
    lengths = [len(ids) for ids in tokenised if len(ids) > limit]
    return (
        f"{key}: {len(lengths)} of {len(tokenised)} prompts are over data.max_prompt_length={limit} tokens, "
        f"the first at {first} ({lengths[0]} tokens). Set data.max_prompt_length={max(lengths)}, or "
        "data.overlong_prompts to filter or truncate_left"
    )


class PromptLoader:
    """Batches of `batch_size` prompts without end.

    Each epoch has its own order, drawn from (seed, epoch). A batch that an epoch cannot fill is completed
    from the next one, so no prompt is left out; it may then hold the same prompt twice.
    """

    def __init__(self, dataset: PromptDataset, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(
                f"data.train_batch_size={batch_size} must be between 1 and the {len(dataset)} prompts of "
                "data.train_files: lower it or add data"
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._identity = {"seed": seed, "shuffle": shuffle, "fingerprint": dataset.fingerprint()}
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, counted from 0."""
        return self._epoch

    def steps(self, epochs: int) -> int:
        """Batches until every prompt has been served `epochs` times."""
        return math.ceil(epochs * len(self._dataset) / self._batch_size)

    def next_batch(self) -> list[Prompt]:
        """The next `batch_size` prompts."""
        return [self._next() for _ in range(self._batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; JSON-able."""
        return {"epoch": self._epoch, "position": self._position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ValueError where seed, shuffling or prompts are not the same."""
        for name, ours in self._identity.items():
            if state[name] != ours:
                raise ValueError(
                    f"the checkpoint was taken with other data ({name} {state[name]}, now {ours}): resume "
                    "with the same data section, trainer.seed and tokenizer"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)

    def _next(self) -> Prompt:
        prompt: Prompt = self._dataset[self._order[self._position]]
        self._position += 1
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        return prompt

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._dataset)))
        if self._shuffle:
            random.Random(f"{self._seed}:{epoch}").shuffle(order)
        return order
