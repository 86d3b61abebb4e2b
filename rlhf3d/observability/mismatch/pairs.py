"""Pairs of log-probs, the engine's and the trainer's, of the sampled tokens of a run.

Invariant: every token that has both is there once, and all arrays are as long as there are tokens;
what is no finite number is counted and left out. Pure but for reading the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rlhf3d.observability.tokens import TokenSpan, TrajectoryTokens, read_steps

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RowTexts:
    """What a row says, and where it is found."""

    step: int
    trajectory: int
    texts: Sequence[str]


@dataclass(frozen=True)
class Pairs:
    """Arrays over tokens, in the order of their rows."""

    engine: Array
    """Log-prob that the token was sampled with, nats."""
    trainer: Array
    """Log-prob of the same token in training, before the update, nats."""
    row: Array
    """Number of its row."""
    position: Array
    """Tokens before it in its row, prompt included."""
    turn: Array
    """Number of its sampled span in the row."""
    prompt_length: Array
    row_length: Array
    """Of its row, tokens."""
    written: Array
    """Version of the policy that wrote it."""
    trained: Array
    """Version that was trained on it, before the update."""
    texts: Sequence[RowTexts] = ()
    """By number of a row; empty where nobody asks for words."""
    not_finite: int = 0
    """Tokens left out because one of their log-probs is NaN or infinite."""

    def __len__(self) -> int:
        return len(self.engine)

    @property
    def difference(self) -> Array:
        """Engine − trainer, nats."""
        return self.engine - self.trainer

    @property
    def place(self) -> Array:
        """Tokens between its row's prompt and it."""
        return self.position - self.prompt_length

    @property
    def age(self) -> Array:
        """Versions between the one that wrote it and the one that is trained."""
        return self.trained - self.written

    def where(self, mask: Array) -> Pairs:
        """The tokens that `mask` says."""
        arrays = {name: getattr(self, name)[mask] for name in ARRAYS}
        return replace(self, **arrays)


ARRAYS = tuple(item.name for item in fields(Pairs) if item.name not in ("texts", "not_finite"))


def read_pairs(run: Path) -> Pairs:
    """The pairs of a run's token files. ValueError where there are none."""
    steps = read_steps(run)
    if not steps:
        raise ValueError(
            f"{run} holds no tokens to compare: a run keeps those of the first "
            "trainer.sample_tokens trajectories of each step, which must be above 0"
        )
    pairs = pairs_of(steps)
    if not len(pairs) and not pairs.not_finite:
        raise ValueError(
            f"{run}: its sampled tokens have only the engine's log-probs: with "
            "algorithm.rollout_correction.bypass_mode training computes none of its own; set it "
            "to false for a few steps"
        )
    return pairs


def pairs_of(steps: Iterable[tuple[int, Iterable[TrajectoryTokens]]]) -> Pairs:
    """The pairs of the tokens of some steps, each with its number."""
    columns: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    texts: list[RowTexts] = []
    for step, found in steps:
        for one in found:
            for spans in one.rows:
                _add_row(columns, spans, len(texts), one.trained_version)
                words = list(chain.from_iterable(span.texts for span in spans))
                texts.append(RowTexts(step, one.number, words))
    arrays = {name: np.array(values) for name, values in columns.items()}
    # None, where a number was not finite, becomes NaN.
    arrays |= {name: arrays[name].astype(float) for name in ("engine", "trainer")}
    finite = np.isfinite(arrays["engine"]) & np.isfinite(arrays["trainer"])
    pairs = Pairs(**arrays, texts=texts, not_finite=int((~finite).sum()))
    return pairs.where(finite)


def _add_row(
    columns: dict[str, list[Any]], spans: Sequence[TokenSpan], row: int, trained: int | None
) -> None:
    """Append the tokens of a row that have both log-probs."""
    prompt = sum(len(span.token_ids) for span in spans if span.author == "prompt")
    length = sum(len(span.token_ids) for span in spans)
    start = turn = 0
    for span in spans:
        count = len(span.token_ids)
        if span.author == "sampled":
            if span.old_logprobs is not None:
                _add_span(columns, span, trained)
                for name, value in (("row", row), ("turn", turn)):
                    columns[name] += [value] * count
                columns["position"] += range(start, start + count)
                columns["prompt_length"] += [prompt] * count
                columns["row_length"] += [length] * count
            turn += 1
        start += count


def _add_span(columns: dict[str, list[Any]], span: TokenSpan, trained: int | None) -> None:
    count = len(span.token_ids)
    written = [0 if trained is None else trained] * count
    for first, version in span.versions:
        written[first:] = [version] * (count - first)
    columns["engine"] += span.rollout_logprobs
    columns["trainer"] += span.old_logprobs or ()
    columns["written"] += written
    # Files of earlier versions do not say which was trained: then that which wrote.
    columns["trained"] += written if trained is None else [trained] * count
