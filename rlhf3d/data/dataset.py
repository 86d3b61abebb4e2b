"""Rows as tokenized prompts, and what happens to those that are too long.

Invariant: nothing is left out or cut in silence: `dropped` and `truncated` count it, before the
first step where the set is small enough to be tokenized completely (`SCANNED` rows), else while it
is served.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf3d.config.fields import Overlong
from rlhf3d.data.parquet import data_sources
from rlhf3d.data.rows import PromptRow
from rlhf3d.data.store import RowStore
from rlhf3d.tokenizer.chat import ChatTokenizer, Message, begun, is_needed, left_out, tokenize

SCANNED = 100_000
"""Rows up to which a set is tokenized once before the run; of a larger one, `PROBED` rows are."""
PROBED = 2_000


OfferedTools = Callable[[Mapping[str, Any]], Sequence[Any]]
"""The tools of a row's environment, as JSON schemas, by the row's columns."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenized, and what its completions are scored with."""

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
    """The beginning of the answer that the prompt ends with: the template's, or the assistant's."""
    tools: Sequence[Any] = ()
    """JSON schemas of the tools that it offers, those of its environment included."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What its environment is reset with, see `PromptRow.columns`; empty where it has none."""


class PromptDataset(Sequence[Prompt]):
    """The prompts of some parquet files, tokenized when they are asked for.

    `overlong` says what to do with prompts over `max_prompt_length` tokens: error, filter (left out
    and counted in `dropped`), truncate_left or truncate_right (the last or the first tokens stay,
    counted in `truncated`). `max_samples` uses only the first rows; -1 for all. A prompt with a
    token beyond the model's `vocab_size` is refused. Errors are ValueErrors that name `key`.
    `offered`: the tools of a row's environment, as JSON schemas; it raises ValueError for a row
    whose environment cannot be used. Without it, a row that names an environment is refused.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: ChatTokenizer,
        max_prompt_length: int,
        overlong: Overlong = "error",
        max_samples: int = -1,
        key: str = "data.train_files",
        cache_dir: str | Path | None = None,
        vocab_size: int | None = None,
        offered: OfferedTools | None = None,
    ) -> None:
        if not files:
            raise ValueError(f"{key}: no files named; give one or more parquet files of prompts")
        self._store = RowStore(files, cache_dir, environments=offered is not None)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._limit, self._overlong = max_prompt_length, overlong
        self._key, self._offered = key, offered
        self.rows = len(self._store) if max_samples < 0 else min(max_samples, len(self._store))
        """Rows of the files, those that are left out included."""
        self.scanned = self.rows <= SCANNED
        """Whether all rows were looked at, so that `dropped` and `truncated` are final."""
        self.dropped = self.truncated = 0
        self.left_out: Counter[str] = Counter()
        """Parts of messages that the chat template does not write, and in how many prompts."""
        self._numbers: Sequence[int] = range(self.rows)
        """Numbers of the rows that are served."""
        self._sources: set[str] = set()
        self._prepared: dict[int, tuple[PromptRow, tuple[int, ...], str]] = {}
        """What `prepare` made and nobody has had yet, by the row's number."""
        self._fingerprint = ""
        self._scan()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """The prompt; ValueError where `get` gives none."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        prompt = self.get(index)
        if prompt is None:
            where = self._store.where(self._numbers[index])
            raise ValueError(f"{self._key}: {where} is over data.max_prompt_length")
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        for index in range(len(self)):
            prompt = self.get(index)
            if prompt is not None:
                yield prompt

    def get(self, index: int, again: bool = False) -> Prompt | None:
        """The prompt; null where it is too long, to be filtered, and was not known to be.

        `again`: it was served before, and so is counted already.
        """
        # What a scan has counted is not counted again either.
        return self._prompt(self._numbers[index], count=not self.scanned and not again)

    def of_row(self, number: int) -> Prompt:
        """A prompt that was served before, by `Prompt.index`: it is not counted a second time.

        ValueError where no prompt is served of that row.
        """
        prompt = None
        if 0 <= number < self.rows:
            prompt = self._prompt(number, count=False)
        if prompt is None:
            raise ValueError(
                f"{self._key}: row {number} of {self.rows} is no prompt; use the same files, "
                "data.max_prompt_length and chat template as before"
            )
        return prompt

    def _prompt(self, number: int, count: bool) -> Prompt | None:
        """The prompt of a row, see `get`; `count`: as served, if it is cut or left out."""
        # In one look: `prepare` may be at work in another thread.
        ready = self._prepared.pop(number, None)
        row, ids, opening = ready or self._rendered(number)
        if count:
            self._count_left_out(row, number)
        if len(ids) > self._limit:
            if self._overlong == "error":
                raise ValueError(self._overlong_message(1, self.rows, number, len(ids), len(ids)))
            if count:
                self.dropped += self._overlong == "filter"
                self.truncated += self._overlong != "filter"
            if self._overlong == "filter":
                return None
        return Prompt(
            prompt_ids=self._cut(ids),
            data_source=row.data_source,
            ground_truth=row.ground_truth,
            extra_info=row.extra_info,
            index=number,
            text=row.question,
            messages=row.prompt,
            begun=opening,
            tools=row.tools,
            columns={} if self._offered is None else row.columns,
        )

    def prepare(self, indices: Iterable[int]) -> None:
        """Do ahead of time, in any thread, what takes the most of it when these are served."""
        wanted = [self._numbers[index] for index in indices]
        # One that was served while it was prepared stays until here, and not for an epoch.
        for number in set(self._prepared).difference(wanted):
            self._prepared.pop(number, None)
        for number in wanted:
            if number not in self._prepared:
                # What goes wrong is raised where the prompt is served.
                with suppress(Exception):
                    self._prepared[number] = self._rendered(number)

    def _rendered(self, number: int) -> tuple[PromptRow, tuple[int, ...], str]:
        """A row, the tokens of its prompt, and what of the answer these begin."""
        row = self._row(number)
        ids = self._tokenize(row, number)
        return row, ids, begun(self._tokenizer, row.prompt, ids, row.tools)

    def row(self, index: int) -> PromptRow:
        """The row behind a prompt, not tokenized."""
        return self._store[self._numbers[index]]

    def number(self, index: int) -> int:
        """Number of a prompt's row, counted through all the files (`Prompt.index`)."""
        return self._numbers[index]

    def sample(self, count: int) -> list[PromptRow]:
        """At most `count` rows, evenly spread over the set."""
        # Rounded up, so that there are at most `count`.
        step = max(1, -(-len(self) // count))
        return [self.row(index) for index in range(0, len(self), step)]

    @property
    def data_sources(self) -> list[str]:
        """The distinct data sources, sorted."""
        if self.scanned:
            return sorted(self._sources)
        return sorted(data_sources(self._store.files, environments=self._offered is not None))

    @property
    def file_ranges(self) -> list[range]:
        """The indices of each file's prompts."""
        # `_numbers` ascend, and a file's rows are consecutive: each file is a range of indices.
        stops = [bisect.bisect_left(self._numbers, rows.stop) for rows in self._store.file_ranges]
        return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]

    def summary(self) -> str:
        """One line on what is served, for the run's header."""
        known = ""
        if not self.scanned:
            known = f" (known of {PROBED}; the rest is looked at when it is served)"
        parts = [
            f"{self._key}: {len(self)} of {self.rows} prompts, {self.dropped} dropped and "
            f"{self.truncated} truncated over data.max_prompt_length={self._limit}{known}"
        ]
        for part, count in self.left_out.items():
            parts.append(f"the chat template leaves {part} of {count} prompts out")
        return "; ".join(parts)

    def fingerprint(self) -> str:
        """A digest of token ids and ground truths in order.

        Of a set that is not scanned, those of the probed rows, and the number of all.
        """
        return self._fingerprint

    def _scan(self) -> None:
        """Tokenize all rows, or evenly spread ones of a large set, and count the overlong."""
        # Rounded down, so that at least `PROBED` rows are looked at.
        step = 1 if self.scanned else self.rows // PROBED
        looked_at = range(0, self.rows, step)
        # 8 bytes a row; a list would hold an object for each.
        served, lengths = array("q"), array("q")
        first = -1
        digest = hashlib.sha256()
        for number in looked_at:
            row = self._row(number)
            ids = self._tokenize(row, number)
            self._count_left_out(row, number)
            if len(ids) > self._limit:
                first = number if not lengths else first
                lengths.append(len(ids))
                if self._overlong == "filter":
                    continue
            served.append(number)
            cut = self._cut(ids)
            # With its length in front: moving a token to the next prompt changes the digest.
            digest.update(array("q", (len(cut), *cut)).tobytes())
            # repr, which tells the text "3" from the number.
            digest.update(repr(row.ground_truth).encode())
            self._sources.add(row.data_source)
        # After all rows, so that the message gives the limit that all of them need.
        if lengths and self._overlong == "error":
            raise ValueError(
                self._overlong_message(
                    len(lengths), len(looked_at), first, lengths[0], max(lengths)
                )
            )
        if not served:
            raise ValueError(
                f"{self._key}: no prompt left of {len(looked_at)} rows ({len(lengths)} over "
                f"data.max_prompt_length={self._limit}); raise data.max_prompt_length or name "
                "other files"
            )
        if not self.scanned:
            digest.update(str(self.rows).encode())
        elif self._overlong == "filter":
            self.dropped = len(lengths)
        else:
            self.truncated = len(lengths)
        # Never of a set that is not scanned: there `served` holds the probed rows only.
        if self.dropped:
            self._numbers = served
        self._fingerprint = digest.hexdigest()

    def _cut(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """At most as many tokens as the limit allows."""
        return ids[: self._limit] if self._overlong == "truncate_right" else ids[-self._limit :]

    def _row(self, number: int) -> PromptRow:
        """A row with the tools of its environment beside its own."""
        row = self._store[number]
        if self._offered is None:
            if row.environment is not None:
                raise ValueError(
                    f"{self._key}: {self._store.where(number)} has environment "
                    f"{row.environment!r}: set environment.path to the file with that class"
                )
            return row
        try:
            return with_tools(row, self._offered)
        except ValueError as error:
            raise ValueError(f"{self._key}: {self._store.where(number)}: {error}") from error

    def _tokenize(self, row: PromptRow, number: int) -> tuple[int, ...]:
        try:
            ids = tokenize(self._tokenizer, row.prompt, row.tools)
            if row.prompt[-1]["role"] == "assistant":
                # Serving such a prompt renders it without its last message too: try that now.
                begun(self._tokenizer, row.prompt, ids, row.tools)
        except Exception as error:  # a template may raise anything, and does not know the row
            raise ValueError(
                f"{self._key}: {self._store.where(number)}: model.path's chat template does not "
                f"take this prompt: {error}"
            ) from error
        largest = max(ids, default=0)
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise ValueError(
                f"{self._key}: {self._store.where(number)}: the prompt in the chat template holds "
                f"token {largest}, the model has embeddings for 0 to {self._vocab_size - 1} "
                "(vocab_size of its config.json): tokenizer and model do not belong together; give "
                "the tokenizer that the model was trained with, or resize the model's embeddings"
            )
        return ids

    def _count_left_out(self, row: PromptRow, number: int) -> None:
        """Count what the template does not write; ValueError for what changes the meaning."""
        for part in left_out(self._tokenizer, row.prompt, row.tools):
            if is_needed(part):
                raise ValueError(
                    f"{self._key}: {self._store.where(number)}: model.path's chat template does "
                    f"not write {part}; name one that does (model.chat_template, evaluate "
                    "--chat-template), or leave the row out"
                )
            self.left_out[part] += 1

    def _overlong_message(self, count: int, of: int, first: int, length: int, longest: int) -> str:
        return (
            f"{self._key}: {count} of {of} prompts are over data.max_prompt_length={self._limit} "
            f"tokens, the first at {self._store.where(first)} ({length} tokens). Set "
            f"data.max_prompt_length={longest}, or data.overlong_prompts to filter, truncate_left "
            "or truncate_right"
        )


def with_tools(row: PromptRow, offered: OfferedTools) -> PromptRow:
    """A row with the tools of its environment beside its own; ValueError as `offered`."""
    tools = offered(row.columns)
    # A data set may list the same tools already, written for another library.
    known = [_tool_name(tool) for tool in tools]
    own = [tool for tool in row.tools if _tool_name(tool) not in known]
    return replace(row, tools=[*own, *tools])


def _tool_name(tool: Any) -> Any:
    """The name in a tool's JSON schema; null where it has none."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return function.get("name") if isinstance(function, Mapping) else None
