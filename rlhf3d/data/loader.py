"""Batches of prompts without end, in an order that a checkpoint can resume exactly.

Invariant: the prompts of a run are a function of (files, tokenizer, seed, batch size, weights,
curriculum) and the position alone; without weights or a curriculum each epoch serves every prompt
of the set exactly once.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf3d.data.dataset import Prompt, PromptDataset
from rlhf3d.data.order import LARGE_ORDER, PYTHON_ROWS, make_order
from rlhf3d.data.rows import PromptRow
from rlhf3d.user_code import guarded, load_function


class Curriculum:
    """A user's function from a row and the epoch to its place.

    Low numbers are served first; null leaves the row out of the epoch.
    """

    def __init__(
        self, path: str | Path, name: str = "difficulty", kwargs: dict[str, Any] | None = None
    ) -> None:
        self._function = guarded(load_function(Path(path).resolve(), name, "data.curriculum"), path)
        self._kwargs = dict(kwargs or {})
        # The file's text is part of the identity: an edited function gives another order.
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.identity = f"{name}:{sorted(self._kwargs.items())}:{digest}"

    def __call__(self, row: PromptRow, epoch: int) -> float | None:
        """Place of a row; ValueError where the function fails or returns no finite number."""
        try:
            value = self._function(row, epoch, **self._kwargs)
            if value is None:
                return None
            place = float(value)
            if not math.isfinite(place):
                raise ValueError(f"it returned {place}")
            return place
        except Exception as error:
            raise ValueError(
                f"data.curriculum: the function fails on {str(row)[:200]}: "
                f"{type(error).__name__}: {error}"
            ) from error


class PromptLoader:
    """Batches of `batch_size` prompts.

    Each epoch has its own order, drawn from (seed, epoch). A batch that an epoch cannot fill is
    completed from the next one, so no prompt is left out; it may then hold the same prompt twice.
    With `weights`, one for each file, every prompt's file is drawn by them, and each file has
    epochs of its own.
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
                f"data.train_batch_size={batch_size} must be between 1 and the {len(dataset)} "
                "prompts of data.train_files: lower it or add data"
            )
        _check_weights(weights, dataset)
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._weights, self._curriculum = tuple(weights), curriculum
        if weights:
            ranges = dataset.file_ranges
            # A key of its own for each file, so that files of equal length are not shuffled alike.
            keys = [f"{seed}:{number}" for number in range(len(ranges))]
        else:
            ranges, keys = [range(len(dataset))], [str(seed)]
        difficulty = self._difficulty if curriculum is not None else None
        self._streams = [
            _Stream(rows, key, shuffle, difficulty) for rows, key in zip(ranges, keys, strict=True)
        ]
        self._served = 0
        self._identity = {
            "seed": seed,
            "shuffle": shuffle,
            "weights": list(weights),
            "curriculum": curriculum.identity if curriculum else None,
            "fingerprint": dataset.fingerprint(),
        }
        # Only there: an order of fewer rows does not depend on it.
        if shuffle and max(map(len, ranges)) > PYTHON_ROWS:
            self._identity["order"] = LARGE_ORDER

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, counted from 0; of the file that is furthest behind."""
        return min(stream.epoch for stream in self._streams)

    def next_batch(self) -> list[Prompt]:
        """The next `batch_size` prompts."""
        return [self._next() for _ in range(self._batch_size)]

    def prepare(self) -> None:
        """Tokenize most of the next batch now, in any thread: its prompts then come at once."""
        # Of several files it is drawn late which one is next; of an epoch's end, in which order.
        if not self._weights:
            self._dataset.prepare(self._streams[0].upcoming(self._batch_size))

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; JSON-able."""
        return {
            "streams": [[stream.epoch, stream.position] for stream in self._streams],
            "served": self._served,
            "dropped": self._dataset.dropped,
            "truncated": self._dataset.truncated,
            **self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; ValueError where seed, shuffling or prompts differ."""
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(
                    f"the checkpoint was taken with other data ({name} {state.get(name)}, now "
                    f"{ours}): resume with the same data section, trainer.seed, tokenizer and "
                    "chat template"
                )
        # Orders are not saved: the identity was equal, so each follows from key and epoch.
        for stream, (epoch, position) in zip(self._streams, state["streams"], strict=True):
            stream.move_to(epoch, position)
        self._served = state["served"]
        self._dataset.dropped, self._dataset.truncated = state["dropped"], state["truncated"]

    def _difficulty(self, epoch: int, index: int) -> float | None:
        assert self._curriculum is not None
        return self._curriculum(self._dataset.row(index), epoch)

    def _next(self) -> Prompt:
        stream = self._streams[0]
        if self._weights:
            # Seeded by the count of prompts alone, so a position needs no state of a generator.
            draw = random.Random(f"{self._seed}:file:{self._served}")
            stream = draw.choices(self._streams, self._weights)[0]
        self._served += 1
        # The dataset gives None for an overlong prompt; after this many tries all of them are.
        for _ in range(len(self._dataset) + 1):
            # Before `next`, which moves on to the next epoch. In the first one all rows are new.
            again = stream.epoch > 0
            prompt = self._dataset.get(stream.next(), again)
            if prompt is not None:
                return prompt
        raise ValueError("data.train_files: every prompt is over data.max_prompt_length; raise it")


class _Stream:
    """Position in the endless epochs of some rows."""

    def __init__(
        self,
        rows: range,
        key: str,
        shuffle: bool,
        difficulty: Callable[[int, int], float | None] | None,
    ) -> None:
        self._rows, self._key, self._shuffle, self._difficulty = rows, key, shuffle, difficulty
        self.move_to(0, 0)

    def move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        difficulty = partial(self._difficulty, epoch) if self._difficulty else None
        self._order = make_order(self._rows, f"{self._key}:{epoch}", self._shuffle, difficulty)
        if not self._order:
            raise ValueError(
                f"data.curriculum: the function leaves every prompt out of epoch {epoch}"
            )

    def upcoming(self, count: int) -> list[int]:
        """The next ones of this epoch, at most `count`."""
        return list(self._order[self.position : self.position + count])

    def next(self) -> int:
        index = self._order[self.position]
        self.position += 1
        # At once and not at the next call: `epoch` and the state are those of the next prompt.
        if self.position == len(self._order):
            self.move_to(self.epoch + 1, 0)
        return index


def _check_weights(weights: Sequence[float], dataset: PromptDataset) -> None:
    if not weights:
        return
    ranges = dataset.file_ranges
    if len(weights) != len(ranges) or min(weights) < 0 or not sum(weights):
        raise ValueError(
            f"data.train_weights={list(weights)}: give one number for each of the {len(ranges)} "
            "files of data.train_files, 0 or more and not all 0"
        )
    if any(weight and not rows for weight, rows in zip(weights, ranges, strict=True)):
        raise ValueError(
            f"data.train_weights={list(weights)}: a file with a weight above 0 has no prompt left"
        )
