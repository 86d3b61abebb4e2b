"""Ground truths against their own scorers, all of them: for `rlhf3d data check`.

Invariant: a ground truth is right where its own scorer gives full marks to a statement of it. A
scorer that failed gave no verdict: neither right nor wrong.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rlhf3d.data.check import SHOWN, CheckReport, FileCheck, Marks, check_files
from rlhf3d.data.dataset import OfferedTools
from rlhf3d.data.parquet import data_sources
from rlhf3d.data.rows import PromptRow
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.score import Score, ScoreItem
from rlhf3d.rewards.scorers import DATA_SOURCES, BuiltinReward, scorer_of
from rlhf3d.rewards.truths import shown
from rlhf3d.tokenizer.chat import ChatTokenizer

_BATCH = 2048
_WARM_UP = 8
"""Answers scored before the speed is measured, so that the processes are ready."""


def check_prompt_files(
    files: Sequence[str | Path],
    tokenizer: ChatTokenizer | None = None,
    max_prompt_length: int | None = None,
    reward: RewardFunction | None = None,
    scorers: Mapping[str, str] | None = None,
    method: str = "strict",
    workers: int = 1,
    timeout_s: float = 10.0,
    offered: OfferedTools | None = None,
    graded: bool = True,
) -> CheckReport:
    """Check prompt files, and their ground truths with the built-in scorers or `reward`.

    `offered`: of the configuration's environments, which all rows then have. Without `graded`,
    ground truths are not scored.
    """
    if not graded:
        checks = check_files(files, tokenizer, max_prompt_length, offered=offered)
        return CheckReport(checks)
    scorers = scorers or {}
    sources = data_sources(files, environments=offered is not None) & {*DATA_SOURCES, *scorers}
    function = reward or BuiltinReward(method, tuple(sorted(sources)), scorers)
    with RewardManager(function, workers=workers, timeout_s=timeout_s) as pool:
        grader = TruthGrader(pool, scorers, custom=reward is not None)
        checks = check_files(files, tokenizer, max_prompt_length, grader, offered)
    return CheckReport(checks, grader.answers_per_s)


class _Answer(NamedTuple):
    kind: Literal["truth", "solution"]
    where: str
    item: ScoreItem


class TruthGrader:
    """Scores the ground truths and worked solutions of rows, a batch at a time."""

    def __init__(self, pool: RewardManager, scorers: Mapping[str, str], custom: bool) -> None:
        self._pool, self._scorers, self._custom = pool, scorers, custom
        self._marks: dict[str, Marks] = {}
        self._waiting: list[_Answer] = []
        self._answers, self._seconds = 0, 0.0

    @property
    def answers_per_s(self) -> float | None:
        """How fast the scorer was; null where nothing was scored."""
        return round(self._answers / self._seconds, 1) if self._seconds else None

    def add(self, row: PromptRow, where: str) -> None:
        """Take a row's answers; ValueError where no scorer compares with its ground truth."""
        marks = self._marks.setdefault(row.data_source, Marks())
        marks.rows += 1
        if row.ground_truth is None:  # for a reward model: there is nothing to compare with
            marks.without_truth += 1
            return
        if not self._custom and row.data_source not in {**DATA_SOURCES, **self._scorers}:
            marks.without_scorer += 1
            return
        for text in self._statements(row):
            self._wait("truth", row, text, where)
        solution = row.extra_info.get("answer")
        if isinstance(solution, str) and solution:
            self._wait("solution", row, solution, where)
        if len(self._waiting) >= _BATCH:
            self._score()

    def finish(self, check: FileCheck) -> None:
        """Write the marks, problems and warnings of the rows since the last call to `check`."""
        self._score()
        check.marks, self._marks = self._marks, {}
        for data_source, marks in check.marks.items():
            _judge(check, data_source, marks, self._custom)

    def _statements(self, row: PromptRow) -> list[str]:
        if self._custom:
            return [shown(row.ground_truth)]
        return scorer_of(row.data_source, self._scorers).statements(row.ground_truth)

    def _wait(
        self, kind: Literal["truth", "solution"], row: PromptRow, text: str, where: str
    ) -> None:
        item = ScoreItem(row.data_source, text, row.ground_truth, row.extra_info)
        self._waiting.append(_Answer(kind, where, item))

    def _score(self) -> None:
        if not self._waiting:
            return
        if not self._answers:
            self._pool.score_batch([self._waiting[0].item] * _WARM_UP)
        start = time.monotonic()
        scores = self._pool.score_batch([answer.item for answer in self._waiting])
        self._seconds += time.monotonic() - start
        self._answers += len(scores)
        for answer, score in zip(self._waiting, scores, strict=True):
            _mark(self._marks[answer.item.data_source], answer, score)
        self._waiting = []


def _mark(marks: Marks, answer: _Answer, score: Score) -> None:
    kind, where, item = answer
    marks.graded += 1
    if score.failed:  # no verdict: neither right nor wrong
        marks.failed += 1
        if len(marks.failures) < SHOWN:
            marks.failures.append(f"{where}: {score.outcome.value} on the {kind}: {score.reason}")
        return
    right = score.accuracy >= 1.0
    if kind == "truth":
        marks.truths += 1
        marks.truth_right += right
    else:
        marks.solutions += 1
        marks.solutions_right += right
    if not right and len(marks.misses) < SHOWN:
        extracted = str(score.extra.get("answer"))[:80]
        marks.misses.append(
            f"{where}: {kind} of {str(item.ground_truth)[:80]!r} gets {score.value:g} "
            f"({score.outcome.value}, answer {extracted!r})"
        )


def _judge(check: FileCheck, data_source: str, marks: Marks, custom: bool) -> None:
    """Turn the marks of one data source into problems and warnings."""
    if marks.without_truth:
        check.warnings.append(
            f"{data_source}: {marks.without_truth} of {marks.rows} rows have no ground truth: only "
            "a reward model or an environment can score them"
        )
    if marks.without_scorer:
        check.problems.append(
            f"no scorer for data_source {data_source!r} ({marks.without_scorer} rows): name one in "
            "reward.scorers, or set custom_reward_function.path"
        )
    if marks.failed:
        check.problems.append(
            f"{data_source}: {marks.failed} of {marks.graded} answers were not scored "
            f"({marks.failures[0]})"
        )
    wrong = marks.truths - marks.truth_right
    if wrong:
        # A user's function may want more than the bare truth, so there it is no problem.
        texts = check.warnings if custom else check.problems
        texts.append(
            f"{data_source}: {wrong} of {marks.truths} ground truths do not get full marks "
            f"({marks.misses[0]})"
        )
    wrong = marks.solutions - marks.solutions_right
    if wrong:
        check.warnings.append(
            f"{data_source}: {wrong} of {marks.solutions} worked solutions do not get full marks"
        )
