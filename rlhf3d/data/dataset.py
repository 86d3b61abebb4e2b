"""Rows as tokenised prompts, and what becomes of those that are too long.

Invariant: nothing is left out or cut in silence: `dropped` and `truncated` count it, before the first step where the
set is small enough to be read whole (`SCANNED` rows), else while it is served.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.data.parquet import data_sources
from rlhf3d.data.rows import PromptRow
from rlhf3d.data.store import RowStore
from rlhf3d.tokenizer.chat import NEEDED, ChatTokenizer, Message, begun, left_out, tokenise

OVERLONG = ("error", "filter", "truncate_left", "truncate_right")
SCANNED = 100_000
"""Rows up to which a set is tokenised once before the run; of a larger one, `PROBED` rows are."""
PROBED = 2_000


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenised, and what its completions are scored with."""

    prompt_ids: tuple[int, ...]
    """Token ids, chat template and generation prompt included."""
    data_source: str
    ground_truth: Any
    """As in the file: text for the built-in scorers, null in rows for a reward model."""
    extra_info: dict[str, Any]
    index: int
    """Number of the row, counted through all the files."""
    text: str
    """What is asked, for people to read: the last message that is not the assistant's."""
    messages: Sequence[Message] = ()
    """The chat messages."""
    begun: str = ""
    """What the prompt's end holds of the answer: the template's opening, the assistant's own last words."""


class PromptDataset(Sequence[Prompt]):
    """The prompts of some parquet files, tokenised when they are asked for.

    `overlong` says what to do with prompts over `max_prompt_length` tokens: error, filter (left out and counted in
    `dropped`), truncate_left or truncate_right (the last or the first tokens are kept, counted in `truncated`).
    `max_samples` uses only the first rows; -1 for all. A prompt with a token beyond the model's `vocab_size` is
    refused. Errors are ValueErrors that name `key`.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: ChatTokenizer,
        max_prompt_length: int,
        overlong: str = "error",
        max_samples: int = -1,
        key: str = "data.train_files",
        cache_dir: str | Path | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if overlong not in OVERLONG:
            raise ValueError(
                f"data.overlong_prompts: no {overlong!r}; choose one of {', '.join(OVERLONG)}"
            )
        if not files:
            raise ValueError(f"{key}: no files named; give one or more parquet files of prompts")
        self._store = RowStore(files, cache_dir)
        self._vocab_size = vocab_size
        self._tokenizer, self._limit, self._overlong, self._key = (
            tokenizer,
            max_prompt_length,
            overlong,
            key,
        )
        self.rows = len(self._store) if max_samples < 0 else min(max_samples, len(self._store))
        """Rows of the files, kept or not."""
        self.scanned = self.rows <= SCANNED
        """Whether all rows were looked at, so that `dropped` and `truncated` are final."""
        self.dropped = self.truncated = 0
        self.left_out: Counter[str] = Counter()
        """Parts of messages that the chat template does not write, and of how many prompts looked at."""
        self._kept: Sequence[int] = range(self.rows)
        self._fingerprint = ""
        self._scan()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        """The prompt; ValueError where a row of an unscanned set is too long and was to be left out (see `get`)."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        prompt = self.get(index)
        if prompt is None:
            raise ValueError(
                f"{self._key}: {self._store.where(self._kept[index])} is over data.max_prompt_length"
            )
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        return (prompt for i in range(len(self)) if (prompt := self.get(i)) is not None)

    def get(self, index: int) -> Prompt | None:
        """The prompt, or null where it is too long, is left out, and that was not known before."""
        number = self._kept[index]
        row = self._store[number]
        ids = self._tokenise(row, number)
        opening = begun(self._tokenizer, row.prompt, ids, row.tools)
        if not self.scanned:
            self._count_left_out(row, number)
        if len(ids) > self._limit:
            if self._overlong == "error":
                raise ValueError(self._overlong_message(1, self.rows, number, len(ids), len(ids)))
            if not self.scanned:
                self.dropped += self._overlong == "filter"
                self.truncated += self._overlong != "filter"
            if self._overlong == "filter":
                return None
            ids = ids[-self._limit :] if self._overlong == "truncate_left" else ids[: self._limit]
        return Prompt(
            ids,
            row.data_source,
            row.ground_truth,
            row.extra_info,
            number,
            row.question,
            row.prompt,
            opening,
        )

    def row(self, index: int) -> PromptRow:
        """The row behind a prompt, not tokenised."""
        return self._store[self._kept[index]]

    def number(self, index: int) -> int:
        """Number of a prompt's row, counted through all the files (`Prompt.index`)."""
        return self._kept[index]

    def sample(self, count: int) -> list[PromptRow]:
        """At most `count` rows, evenly spread over the set."""
        step = max(1, -(-len(self) // count))
        return [self.row(index) for index in range(0, len(self), step)]

    @property
    def data_sources(self) -> list[str]:
        """The distinct data sources, sorted."""
        if self.scanned:
            return sorted(self._sources)
        return sorted(data_sources(self._store.files))

    @property
    def file_ranges(self) -> list[range]:
        """The indices of each file's prompts."""
        stops = [
            bisect.bisect_left(self._kept, numbers.stop) for numbers in self._store.file_ranges
        ]
        return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]

    def summary(self) -> str:
        """One line on what was kept, for the run's header."""
        known = (
            "" if self.scanned else f" (known of {PROBED}; the rest is looked at when it is served)"
        )
        parts = [
            f"{self._key}: {len(self)} of {self.rows} prompts, {self.dropped} dropped and {self.truncated} truncated "
            f"over data.max_prompt_length={self._limit}{known}"
        ]
        parts += [
            f"the chat template leaves {key} of {n} prompts out" for key, n in self.left_out.items()
        ]
        return "; ".join(parts)

    def fingerprint(self) -> str:
        """A digest of token ids and ground truths in order: of all rows, or of the probed ones and their number."""
        return self._fingerprint

    def _scan(self) -> None:
        """Tokenise all rows, or of a large set evenly spread ones, and count the overlong."""
        numbers = range(self.rows) if self.scanned else range(0, self.rows, self.rows // PROBED)
        digest, kept = hashlib.sha256(), array("q")
        lengths = array("q")
        first = -1
        self._sources: set[str] = set()
        for number in numbers:
            row = self._store[number]
            ids = self._tokenise(row, number)
            self._count_left_out(row, number)
            if len(ids) > self._limit:
                lengths.append(len(ids))
                first = number if first < 0 else first
            if len(ids) <= self._limit or self._overlong != "filter":
                kept.append(number)
                cut = (
                    ids[-self._limit :]
                    if self._overlong != "truncate_right"
                    else ids[: self._limit]
                )
                digest.update(array("q", (len(cut), *cut)).tobytes())
                digest.update(repr(row.ground_truth).encode())
                self._sources.add(row.data_source)
        if lengths and self._overlong == "error":
            raise ValueError(
                self._overlong_message(len(lengths), len(numbers), first, lengths[0], max(lengths))
            )
        if not kept:
            raise ValueError(
                f"{self._key}: no prompt left of {len(numbers)} rows ({len(lengths)} over data.max_prompt_length="
                f"{self._limit}); raise data.max_prompt_length or name other files"
            )
        if self.scanned:
            self.dropped = len(lengths) if self._overlong == "filter" else 0
            self.truncated = len(lengths) - self.dropped
            self._kept = kept if self.dropped else range(self.rows)
        else:
            digest.update(str(self.rows).encode())
        self._fingerprint = digest.hexdigest()

    def _tokenise(self, row: PromptRow, number: int) -> tuple[int, ...]:
        try:
            ids = tokenise(self._tokenizer, row.prompt, row.tools)
            if (
                row.prompt[-1]["role"] == "assistant"
            ):  # its words are found by rendering the prompt without them
                begun(self._tokenizer, row.prompt, ids, row.tools)
        except (
            Exception
        ) as error:  # a template may raise anything; without the row nobody could find the cause
            where = f"{self._key}: {self._store.where(number)}"
            raise ValueError(
                f"{where}: model.path's chat template does not take this prompt: {error}"
            ) from error
        if self._vocab_size is not None and max(ids, default=0) >= self._vocab_size:
            raise ValueError(self._unknown_token(max(ids), number, self._vocab_size))
        return ids

    def _count_left_out(self, row: PromptRow, number: int) -> None:
        """Count what the template does not write; ValueError for what the prompt means something else without."""
        for key in left_out(self._tokenizer, row.prompt, row.tools):
            if key in NEEDED:
                raise ValueError(
                    f"{self._key}: {self._store.where(number)}: model.path's chat template does not write {key}; use a "
                    "model whose template does, or leave the row out"
                )
            self.left_out[key] += 1

    def _unknown_token(self, token: int, number: int, vocab_size: int) -> str:
        return (
            f"{self._key}: {self._store.where(number)}: the prompt in the chat template holds token {token}, the model "
            f"has embeddings for 0 to {vocab_size - 1} (vocab_size of its config.json): tokenizer and model do "
            "not belong together; give the tokenizer that the model was trained with, or resize the model's embeddings"
        )

    def _overlong_message(self, count: int, of: int, first: int, length: int, longest: int) -> str:
        return (
            f"{self._key}: {count} of {of} prompts are over data.max_prompt_length={self._limit} tokens, "
            f"the first at {self._store.where(first)} ({length} tokens). Set data.max_prompt_length={longest}, or "
            "data.overlong_prompts to filter, truncate_left or truncate_right"
        )
