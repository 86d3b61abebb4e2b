"""What is in prompt files: usable rows, lengths in tokens, duplicate and shared questions.

Invariant: every row is accounted for: usable or not, within the length limit or not, graded or not.
A `problem` would stop or spoil a run; a `warning` is for the user to judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol

from rlhf3d.data.dataset import OfferedTools, with_tools
from rlhf3d.data.parquet import (
    open_parquet,
    other_columns,
    prompt_columns,
    read_batches,
    read_provenance,
    record_of,
)
from rlhf3d.data.rows import PromptRow, environment_row, question_key, row_of
from rlhf3d.tokenizer.chat import ChatTokenizer, is_needed, left_out, tokenize

_BATCH = 2048
SHOWN = 10
"""Examples of one kind that are listed."""


@dataclass
class Marks:
    """How the ground truths of one data source are scored."""

    rows: int = 0
    without_truth: int = 0
    """Rows for a reward model, which have no ground truth."""
    graded: int = 0
    """Texts scored."""
    without_scorer: int = 0
    """Rows with a ground truth that no scorer compares, as the data source has none."""
    truths: int = 0
    """Accepted answers that got a score: one a row, or each of its list."""
    truth_right: int = 0
    """Of these, those that get full marks when stated as the scorer wants them."""
    solutions: int = 0
    """Worked solutions (`extra_info.answer`) that got a score."""
    solutions_right: int = 0
    failed: int = 0
    """Texts that got no score: the reward function failed or timed out."""
    failures: list[str] = field(default_factory=list)
    """The first of them, with the reason."""
    misses: list[str] = field(default_factory=list)
    """The first solutions or truths without full marks."""


@dataclass
class FileCheck:
    """What one file holds."""

    path: str
    rows: int = 0
    unreadable: list[str] = field(default_factory=list)
    """Rows that cannot be used, with the reason; the first few."""
    unreadable_count: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    """Prompts by their tokens: upper bound of the bin -> count."""
    longest: int = 0
    overlong: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Parts of messages that the chat template does not write, and in how many prompts."""
    duplicates: int = 0
    overlap: dict[str, int] = field(default_factory=dict)
    """Questions shared with each other file that was checked."""
    environments: dict[str, int] = field(default_factory=dict)
    """Rows by the environment that they name; "" for those that name none."""
    marks: dict[str, Marks] = field(default_factory=dict)
    """By data source."""
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """The files, and how fast the scorer was."""

    files: list[FileCheck]
    answers_per_s: float | None = None

    @property
    def problems(self) -> list[str]:
        """All problems, with their files."""
        problems = []
        for file in self.files:
            problems += [f"{file.path}: {problem}" for problem in file.problems]
        return problems

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "problems": self.problems}


class Grader(Protocol):
    """What scores the ground truths of a file's rows (see `rewards.truth_check`)."""

    def add(self, row: PromptRow, where: str) -> None:
        """Take a row; ValueError where nothing can compare with its ground truth."""

    def finish(self, check: FileCheck) -> None:
        """Write marks, problems and warnings of the rows since the last call to `check`."""


def check_files(
    files: Sequence[str | Path],
    tokenizer: ChatTokenizer | None = None,
    max_prompt_length: int | None = None,
    grader: Grader | None = None,
    offered: OfferedTools | None = None,
) -> list[FileCheck]:
    """Check prompt files against each other, a tokenizer and a grader of their ground truths.

    `offered`: of the configuration's environments, which all rows then have.
    """
    checks, keys = [], []
    for path in files:
        check, questions = _read(str(path), tokenizer, max_prompt_length, grader, offered)
        _judge(check, max_prompt_length, environments=offered is not None)
        if grader is not None:
            grader.finish(check)
        checks.append(check)
        keys.append(questions)
    _compare(checks, keys)
    return checks


def _read(
    path: str,
    tokenizer: ChatTokenizer | None,
    limit: int | None,
    grader: Grader | None,
    offered: OfferedTools | None,
) -> tuple[FileCheck, set[bytes]]:
    """The counts of a file, and the digests of its questions."""
    check = FileCheck(path, provenance=read_provenance(path))
    lengths: Counter[int] = Counter()
    questions: set[bytes] = set()
    for number, row in _usable_rows(check, offered):
        # A digest instead of the text: a file may hold millions of questions.
        key = blake2b(question_key(row).encode(errors="replace"), digest_size=12).digest()
        check.duplicates += key in questions
        _count(check.environments, [row.environment or ""])
        questions.add(key)
        try:
            if tokenizer is not None:
                tokens, omitted = _render(tokenizer, row)
                _count(check.left_out, omitted)
                lengths[tokens] += 1
            if grader is not None:
                grader.add(row, f"row {number}")
        except ValueError as error:
            _count_unusable(check, f"row {number}: {error}")
    check.longest = max(lengths, default=0)
    if limit is not None:
        check.overlong = sum(count for length, count in lengths.items() if length > limit)
    check.lengths = histogram(lengths)
    return check, questions


def _usable_rows(check: FileCheck, offered: OfferedTools | None) -> Iterator[tuple[int, PromptRow]]:
    """Rows with their numbers; those that cannot be used are counted in `check`."""
    file = open_parquet(check.path, environments=offered is not None)
    columns = prompt_columns(file.schema_arrow)
    if offered is not None:
        columns += other_columns(file.schema_arrow, check.path)
    for batch in read_batches(file, check.path, _BATCH, columns):
        for offset in range(batch.num_rows):
            where = f"row {check.rows}"
            check.rows += 1
            try:
                record = record_of(batch, offset, where)
                row = row_of(record, where) if offered is None else environment_row(record, where)
                if offered is not None:
                    row = with_tools(row, offered)
            except ValueError as error:
                message = str(error)
                # The configuration's errors do not know the row.
                named = message.startswith(where)
                _count_unusable(check, message if named else f"{where}: {message}")
            else:
                yield check.rows - 1, row


def _render(tokenizer: ChatTokenizer, row: PromptRow) -> tuple[int, list[str]]:
    """Length of a row's prompt in tokens, and what the chat template leaves out of it."""
    try:
        ids = tokenize(tokenizer, row.prompt, row.tools)
        omitted = left_out(tokenizer, row.prompt, row.tools)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template does not take it: {error}") from error
    needed = [key for key in omitted if is_needed(key)]
    if needed:
        raise ValueError(f"the chat template does not write {' and '.join(needed)}")
    return len(ids), omitted


def _count_unusable(check: FileCheck, message: str) -> None:
    check.unreadable_count += 1
    if len(check.unreadable) < SHOWN:
        check.unreadable.append(message)


def _judge(check: FileCheck, limit: int | None, environments: bool) -> None:
    """Turn counts into problems and warnings."""
    if check.unreadable_count:
        check.problems.append(
            f"{check.unreadable_count} of {check.rows} rows cannot be used: {check.unreadable[0]}"
        )
    if check.overlong:
        check.warnings.append(
            f"{check.overlong} of {check.rows} prompts are over data.max_prompt_length={limit} "
            f"(the longest has {check.longest} tokens): data.overlong_prompts decides what "
            "happens to them"
        )
    for key, count in check.left_out.items():
        check.warnings.append(f"the chat template leaves {key} of {count} prompts out")
    unnamed = check.environments.get("", 0)
    if len(check.environments) > (unnamed > 0) and not environments and check.lengths:
        check.warnings.append(
            "rows name environments, whose tools are not in these lengths: give the configuration "
            "with --environment"
        )
    if unnamed and len(check.environments) > 1 and not environments:
        check.warnings.append(
            f"{unnamed} of {check.rows} rows name no environment, the others do: they have that of "
            "environment.name, without which a run refuses them"
        )
    if check.duplicates:
        check.warnings.append(f"{check.duplicates} questions occur more than once")


def _compare(checks: list[FileCheck], keys: list[set[bytes]]) -> None:
    """Questions that two files share; the earlier file of a pair gets the warning."""
    for i, j in permutations(range(len(checks)), 2):
        shared = len(keys[i] & keys[j])
        if not shared:
            continue
        other = checks[j].path
        checks[i].overlap[other] = shared
        if i < j:
            checks[i].warnings.append(
                f"{shared} questions are also in {other}: never train on one and test on both"
            )


def _count(counts: dict[str, int], names: Iterable[str]) -> None:
    """Count names in a plain dict: `asdict` does not copy a Counter, it counts its items."""
    for name in names:
        counts[name] = counts.get(name, 0) + 1


def histogram(lengths: Counter[int], bins: int = 10) -> dict[str, int]:
    """Counts by length in at most `bins` equal bins, named by their upper bound."""
    if not lengths:
        return {}
    width = max(1, -(-max(lengths) // bins))
    counts: Counter[int] = Counter()
    for length, count in lengths.items():
        counts[-(-length // width) * width] += count
    return {str(bound): counts[bound] for bound in range(width, max(counts) + 1, width)}
