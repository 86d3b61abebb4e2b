"""Batches of prompts without end, in an order that a checkpoint can resume exactly.

Invariant: the prompts of a run are a function of (files, tokenizer, seed, batch size, weights, curriculum) and the
position alone; without weights or a curriculum each epoch serves every kept prompt exactly once.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf3d.data.dataset import Prompt, PromptDataset
from rlhf3d.data.order import LARGE_ORDER, PYTHON_ROWS, make_order
from rlhf3d.data.rows import PromptRow
from rlhf3d.user_code import guarded, load_function

__all__ = ["Curriculum", "Prompt", "PromptDataset", "PromptLoader"]


class Curriculum:
    """A user's function from a row and the epoch to its place: low numbers first, null for not in this epoch."""

    def __init__(
        self, path: str | Path, name: str = "difficulty", kwargs: dict[str, Any] | None = None
    ) -> None:
        self._function = guarded(load_function(Path(path).resolve(), name, "data.curriculum"), path)
        self._kwargs = dict(kwargs or {})
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.identity = f"{name}:{sorted(self._kwargs.items())}:{digest}"

    def __call__(self, row: PromptRow, epoch: int) -> float | None:
        """Place of a row; ValueError where the function fails or returns no finite number."""
        try:
            value = self._function(row, epoch, **self._kwargs)
            place = None if value is None else float(value)
            if place is not None and not math.isfinite(place):
                raise ValueError(f"it returned {place}")
            return place
        except Exception as error:
            raise ValueError(
                f"data.curriculum: the function fails on {str(row)[:200]}: {type(error).__name__}: {error}"
            ) from error


class PromptLoader:
    """Batches of `batch_size` prompts.

    Each epoch has its own order, drawn from (seed, epoch). A batch that an epoch cannot fill is completed from the
    next one, so no prompt is left out; it may then hold the same prompt twice. With `weights`, one for each file,
    every prompt's file is drawn by them, and each file has epochs of its own.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        weights: Sequence[float] = (),
        curriculum: Curriculum | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(
                f"data.train_batch_size={batch_size} must be between 1 and the {len(dataset)} prompts of "
                "data.train_files: lower it or add data"
            )
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._weights = _checked(weights, dataset)
        ranges = dataset.file_ranges if weights else [range(len(dataset))]
        names = [f"{seed}:{number}" for number in range(len(ranges))] if weights else [str(seed)]
        difficulty = (
            None
            if curriculum is None
            else lambda index, epoch: curriculum(dataset.row(index), epoch)
        )
        self._streams = [
            _Stream(*part, shuffle, difficulty) for part in zip(ranges, names, strict=True)
        ]
        self._served = 0
        self._identity = {
            "seed": seed,
            "shuffle": shuffle,
            "weights": list(self._weights),
            "curriculum": curriculum.identity if curriculum else None,
            "fingerprint": dataset.fingerprint(),
        }
        if shuffle and max(map(len, ranges)) > PYTHON_ROWS:
            self._identity["order"] = LARGE_ORDER

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, counted from 0; of the file that is furthest behind."""
        return min(stream.epoch for stream in self._streams)

    def steps(self, epochs: int) -> int:
        """Batches until every prompt has been served `epochs` times (with weights: as many prompts)."""
        return math.ceil(epochs * len(self._dataset) / self._batch_size)

    def next_batch(self) -> list[Prompt]:
        """The next `batch_size` prompts."""
        return [self._next() for _ in range(self._batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; JSON-able."""
        streams = [[stream.epoch, stream.position] for stream in self._streams]
        counts = {"dropped": self._dataset.dropped, "truncated": self._dataset.truncated}
        return {"streams": streams, "served": self._served, **counts, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ValueError where seed, shuffling or prompts are not the same."""
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(
                    f"the checkpoint was taken with other data ({name} {state.get(name)}, now {ours}): resume "
                    "with the same data section, trainer.seed and tokenizer"
                )
        for stream, (epoch, position) in zip(self._streams, state["streams"], strict=True):
            stream.move_to(epoch, position)
        self._served = state["served"]
        self._dataset.dropped, self._dataset.truncated = state["dropped"], state["truncated"]

    def _next(self) -> Prompt:
        stream = self._streams[0]
        if self._weights:
            draw = random.Random(f"{self._seed}:file:{self._served}")
            stream = draw.choices(self._streams, self._weights)[0]
        self._served += 1
        for _ in range(len(self._dataset) + 1):
            prompt = self._dataset.get(stream.next())
            if prompt is not None:
                return prompt
        raise ValueError("data.train_files: every prompt is over data.max_prompt_length; raise it")


class _Stream:
    """Position in the endless epochs of some rows."""

    def __init__(
        self,
        rows: range,
        name: str,
        shuffle: bool,
        difficulty: Callable[[int, int], float | None] | None,
    ) -> None:
        self._rows, self._name, self._shuffle, self._difficulty = rows, name, shuffle, difficulty
        self.move_to(0, 0)

    def move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        rate = self._difficulty
        difficulty: Callable[[int], float | None] | None = None
        if rate is not None:
            difficulty = lambda index: rate(index, epoch)  # noqa: E731
        self._order = make_order(self._rows, f"{self._name}:{epoch}", self._shuffle, difficulty)
        if not self._order:
            raise ValueError(
                f"data.curriculum: the function leaves every prompt out of epoch {epoch}"
            )

    def next(self) -> int:
        index = self._order[self.position]
        self.position += 1
        if self.position == len(self._order):
            self.move_to(self.epoch + 1, 0)
        return index


def _checked(weights: Sequence[float], dataset: PromptDataset) -> tuple[float, ...]:
    ranges = dataset.file_ranges
    if weights and (len(weights) != len(ranges) or min(weights) < 0 or not sum(weights)):
        raise ValueError(
            f"data.train_weights={list(weights)}: give one number for each of the {len(ranges)} files of "
            "data.train_files, 0 or more and not all 0"
        )
    if weights and any(weight and not rows for weight, rows in zip(weights, ranges, strict=True)):
        raise ValueError(
            f"data.train_weights={list(weights)}: a file with a weight above 0 has no prompt left"
        )
    return tuple(weights)
