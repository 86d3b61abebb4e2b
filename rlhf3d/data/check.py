"""`rlhf3d data check`: what a run would meet in its prompt files, told before it starts.

Invariant: every row is accounted for: read or not, within the length limit or not, scored with full marks or not. A
`problem` would stop or spoil a run; a `warning` is for the user to judge.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rlhf3d.data.dataset import ChatTokenizer, PromptDataset
from rlhf3d.data.messages import NEEDED, left_out, tokenise
from rlhf3d.data.prepare import question_key
from rlhf3d.data.rows import (
    PromptRow,
    open_parquet,
    read_batches,
    read_provenance,
    record_of,
    row_of,
)
from rlhf3d.data.store import sources_of
from rlhf3d.rewards.pool import ScoringPool
from rlhf3d.rewards.scorers import DATA_SOURCES, WITHOUT_TRUTH, BuiltinReward, scorer_of
from rlhf3d.rewards.scoring import RewardFunction, Score, ScoreItem
from rlhf3d.rewards.truths import shown

_BATCH = 2048
LOOKED_AT, _SCORED = 20_000, 128
"""Rows of each file list that a run compares, and has scored, before it starts."""
_SHOWN = 10
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
    """Texts that got no score: the reward function failed, or was late."""
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
    left_out: Counter[str] = field(default_factory=Counter)
    """Parts of messages that the chat template does not write, and of how many prompts."""
    duplicates: int = 0
    overlap: dict[str, int] = field(default_factory=dict)
    """Questions shared with each other file that was checked."""
    marks: dict[str, Marks] = field(default_factory=dict)
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
        return [f"{file.path}: {problem}" for file in self.files for problem in file.problems]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "problems": self.problems}


def check_files(
    files: Sequence[str | Path],
    tokenizer: ChatTokenizer | None = None,
    max_prompt_length: int | None = None,
    reward: RewardFunction | None = None,
    scorers: dict[str, str] | None = None,
    method: str = "strict",
    workers: int = 1,
    timeout_s: float = 10.0,
) -> CheckReport:
    """Check prompt files against each other, a tokenizer and the scorers (`reward` instead of the built-in ones)."""
    checks, keys = [], []
    clock = _Clock()
    for path in files:
        file = open_parquet(path)
        fn = reward or BuiltinReward(method, _graded_sources(file, path, scorers), scorers or {})
        with ScoringPool(workers, timeout_s, fn) as pool:
            grader = _Grader(pool, scorers, reward is not None, clock)
            check, questions = _read(file, str(path), tokenizer, max_prompt_length, grader)
        _judge(check, max_prompt_length, custom=reward is not None)
        checks.append(check)
        keys.append(questions)
    _compare(checks, keys)
    return CheckReport(checks, clock.rate())


@dataclass
class _Clock:
    """Answers scored, and the seconds they took."""

    answers: int = 0
    seconds: float = 0.0

    def rate(self) -> float | None:
        return round(self.answers / self.seconds, 1) if self.seconds else None


class _Grader:
    """Scores the truths and worked solutions of rows, a batch at a time."""

    def __init__(
        self, pool: ScoringPool, scorers: dict[str, str] | None, custom: bool, clock: _Clock
    ) -> None:
        self._pool, self._scorers, self._custom, self._clock = pool, scorers, custom, clock
        self._items: list[tuple[str, str, ScoreItem]] = []
        self._warm = False

    def add(self, check: FileCheck, row: PromptRow, number: int) -> None:
        """Score what a row holds, sooner or later."""
        truth, where = row.ground_truth, f"row {number}"
        if truth is None:  # for a reward model: there is nothing to compare with
            check.marks[row.data_source].without_truth += 1
            return
        if not self._custom and row.data_source not in {**DATA_SOURCES, **(self._scorers or {})}:
            check.marks[row.data_source].without_scorer += 1
            return
        try:
            scorer = None if self._custom else scorer_of(row.data_source, self._scorers)
            statements = [shown(truth)] if scorer is None else scorer.statements(truth)
        except ValueError as error:
            _unreadable(check, f"{where}: {error}")
            return
        for text in statements:
            self._items.append(
                ("truth", where, ScoreItem(row.data_source, text, truth, row.extra_info))
            )
        solution = row.extra_info.get("answer")
        if isinstance(solution, str) and solution:
            self._items.append(
                ("solution", where, ScoreItem(row.data_source, solution, truth, row.extra_info))
            )
        if len(self._items) >= _BATCH:
            self.flush(check)

    def flush(self, check: FileCheck) -> None:
        """Score what is left."""
        if self._items and not self._warm:
            self._pool.score_batch([self._items[0][2]] * 8)  # the processes are ready from here on
            self._warm = True
        start = time.monotonic()
        scores = self._pool.score_batch([item for _, _, item in self._items])
        self._clock.seconds += time.monotonic() - start
        self._clock.answers += len(scores)
        for (kind, where, item), score in zip(self._items, scores, strict=True):
            _mark(check.marks[item.data_source], kind, where, item, score)
        self._items = []


def _graded_sources(file: Any, path: str | Path, scorers: dict[str, str] | None) -> tuple[str, ...]:
    """The data sources of a file that have a scorer."""
    found: set[Any] = set()
    for batch in read_batches(file, path, _BATCH):
        found |= sources_of(batch)
    return tuple(
        sorted(source for source in found if source in {**DATA_SOURCES, **(scorers or {})})
    )


def _read(
    file: Any, path: str, tokenizer: ChatTokenizer | None, limit: int | None, grader: _Grader
) -> tuple[FileCheck, set[bytes]]:
    """The counts of a file, and the digests of its questions."""
    check = FileCheck(path, provenance=read_provenance(path))
    lengths: Counter[int] = Counter()
    questions: set[bytes] = set()
    for number, row in _rows(file, check):
        key = blake2b(question_key(row).encode(errors="replace"), digest_size=12).digest()
        check.duplicates += key in questions
        questions.add(key)
        if tokenizer is not None:
            try:
                ids = tokenise(tokenizer, row.prompt, row.tools)
                missing = left_out(tokenizer, row.prompt, row.tools)
            except Exception as error:  # a template may raise anything
                _unreadable(check, f"row {number}: the chat template does not take it: {error}")
                continue
            if needed := [key for key in missing if key in NEEDED]:
                _unreadable(
                    check, f"row {number}: the chat template does not write {' and '.join(needed)}"
                )
                continue
            check.left_out.update(missing)
            lengths[len(ids)] += 1
        check.marks.setdefault(row.data_source, Marks()).rows += 1
        grader.add(check, row, number)
    grader.flush(check)
    check.longest = max(lengths, default=0)
    check.overlong = sum(
        count for length, count in lengths.items() if limit is not None and length > limit
    )
    check.lengths = histogram(lengths)
    return check, questions


def _rows(file: Any, check: FileCheck) -> Iterator[tuple[int, PromptRow]]:
    """Usable rows; the others are counted in `check`."""
    for batch in read_batches(file, check.path, _BATCH):
        for offset in range(batch.num_rows):
            number, check.rows = check.rows, check.rows + 1
            try:
                yield number, row_of(record_of(batch, offset, f"row {number}"), f"row {number}")
            except ValueError as error:
                _unreadable(check, str(error))


def _unreadable(check: FileCheck, message: str) -> None:
    check.unreadable_count += 1
    if len(check.unreadable) < _SHOWN:
        check.unreadable.append(message)


def _mark(marks: Marks, kind: str, where: str, item: ScoreItem, score: Score) -> None:
    marks.graded += 1
    if score.failed:  # no verdict: neither right nor wrong
        marks.failed += 1
        if len(marks.failures) < _SHOWN:
            marks.failures.append(f"{where}: {score.outcome.value} on the {kind}: {score.reason}")
        return
    right = score.accuracy >= 1.0
    if kind == "truth":
        marks.truths += 1
        marks.truth_right += right
    else:
        marks.solutions += 1
        marks.solutions_right += right
    if not right and len(marks.misses) < _SHOWN:
        found = f"{score.outcome.value}, answer {str(score.extra.get('answer'))[:80]!r}"
        marks.misses.append(
            f"{where}: {kind} of {str(item.ground_truth)[:80]!r} gets {score.value:g} ({found})"
        )


def _judge(check: FileCheck, limit: int | None, custom: bool) -> None:
    """Turn counts into problems and warnings."""
    if check.unreadable_count:
        check.problems.append(
            f"{check.unreadable_count} of {check.rows} rows cannot be used: {check.unreadable[0]}"
        )
    if check.overlong:
        check.warnings.append(
            f"{check.overlong} of {check.rows} prompts are over data.max_prompt_length={limit} (the longest has "
            f"{check.longest} tokens): data.overlong_prompts says what becomes of them"
        )
    for key, count in check.left_out.items():
        check.warnings.append(f"the chat template leaves {key} of {count} prompts out")
    if check.duplicates:
        check.warnings.append(f"{check.duplicates} questions stand in it more than once")
    for data_source, marks in check.marks.items():
        if marks.without_truth:
            check.warnings.append(
                f"{data_source}: {marks.without_truth} of {marks.rows} rows have no ground truth: only a reward model "
                "can score them"
            )
        if marks.without_scorer:
            check.problems.append(
                f"no scorer for data_source {data_source!r} ({marks.without_scorer} rows): name one in "
                "reward.scorers, or set custom_reward_function.path"
            )
        if marks.failed:
            check.problems.append(
                f"{data_source}: {marks.failed} of {marks.graded} answers were not scored ({marks.failures[0]})"
            )
        if marks.truth_right < marks.truths:
            wrong = marks.truths - marks.truth_right
            text = f"{data_source}: {wrong} of {marks.truths} ground truths do not get full marks"
            (check.warnings if custom else check.problems).append(f"{text} ({marks.misses[0]})")
        if marks.solutions_right < marks.solutions:
            check.warnings.append(
                f"{data_source}: {marks.solutions - marks.solutions_right} of {marks.solutions} worked solutions do "
                "not get full marks"
            )


def _compare(checks: list[FileCheck], keys: list[set[bytes]]) -> None:
    for i, check in enumerate(checks):
        for j, other in enumerate(checks):
            if i != j and (shared := len(keys[i] & keys[j])):
                check.overlap[other.path] = shared
                if i < j:
                    check.warnings.append(
                        f"{shared} questions are in {other.path} too: never train on one and test on both"
                    )


def histogram(lengths: Counter[int], bins: int = 10) -> dict[str, int]:
    """Counts by length in at most `bins` equal bins, named by their upper bound."""
    if not lengths:
        return {}
    width = max(1, -(-max(lengths) // bins))
    counts: Counter[int] = Counter()
    for length, count in lengths.items():
        counts[-(-length // width) * width] += count
    return {str(bound): counts[bound] for bound in range(width, max(counts) + 1, width)}


def training_warnings(
    train: PromptDataset,
    val: PromptDataset | None,
    reward: RewardFunction | None,
    pool: ScoringPool | None,
) -> list[str]:
    """What a run says before it starts, from some of its rows: shared questions, truths that their scorer refuses.

    ValueError for rows without a ground truth where a built-in scorer needs one.
    """
    train_rows, val_rows = train.sample(LOOKED_AT), val.sample(LOOKED_AT) if val else []
    warnings = []
    shared = {question_key(row) for row in train_rows} & {question_key(row) for row in val_rows}
    if shared:
        warnings.append(
            f"{len(shared)} of the questions looked at are in data.train_files and in data.val_files: held-out "
            "accuracy will flatter (`rlhf3d data prepare --exclude` leaves them out)"
        )
    if not isinstance(reward, BuiltinReward) or pool is None:
        return warnings
    rows = [*train.sample(_SCORED), *(val.sample(_SCORED) if val else [])]
    items = stated_truths(rows, reward, "data.train_files, data.val_files")
    scores = pool.score_batch(items)
    refused = [
        item
        for item, score in zip(items, scores, strict=True)
        if not score.failed and score.value < 1.0
    ]
    if refused:
        warnings.append(
            f"{len(refused)} of {len(items)} ground truths looked at do not get full marks from their own scorer, the "
            f"first is {str(refused[0].ground_truth)[:80]!r} of {refused[0].data_source}: see `rlhf3d data check`"
        )
    if failed := [score for score in scores if score.failed]:
        warnings.append(
            f"{len(failed)} of {len(items)} ground truths looked at were not scored, the first: "
            f"{failed[0].reason}: see `rlhf3d data check`"
        )
    return warnings


def stated_truths(rows: Sequence[PromptRow], reward: BuiltinReward, key: str) -> list[ScoreItem]:
    """Completions that state the accepted answers of `rows`; ValueError where no rule compares with one of them."""
    if any(row.ground_truth is None for row in rows):
        raise ValueError(f"{key}: {WITHOUT_TRUTH}")
    items = []
    for row in rows:
        try:
            statements = scorer_of(row.data_source, reward.scorers).statements(row.ground_truth)
        except ValueError as error:
            asked = f"{key}: the row that asks {row.question[:80]!r}"
            raise ValueError(
                f"{asked}: {error} (`rlhf3d data check` names every such row)"
            ) from error
        for text in statements:
            items.append(ScoreItem(row.data_source, text, row.ground_truth, row.extra_info))
    return items
