"""Ground truths against their own scorers, a sample of them: what is reported before a run starts.

Invariant: a run is refused only for a ground truth that its scorer cannot compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf3d.data.dataset import PromptDataset
from rlhf3d.data.rows import PromptRow, question_key
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.score import ScoreItem
from rlhf3d.rewards.scorers import WITHOUT_TRUTH, BuiltinReward, scorer_of

LOOKED_AT = 20_000
"""Rows of each file list that a run compares before it starts."""
_SCORED = 128
"""Rows of each file list that a run has scored before it starts."""


def training_warnings(
    train: PromptDataset,
    val: PromptDataset | None,
    reward: RewardFunction | None,
    pool: RewardManager | None,
) -> list[str]:
    """What a run reports before it starts: shared questions, and ground truths without full marks.

    It looks at a sample of the rows. ValueError for rows without a ground truth where a built-in
    scorer needs one.
    """
    warnings = _shared_questions(train, val)
    # A user's function need not give the bare truth full marks, so it says nothing here.
    if not isinstance(reward, BuiltinReward) or pool is None:
        return warnings
    rows = train.sample(_SCORED)
    if val is not None:
        rows += val.sample(_SCORED)
    items = stated_truths(rows, reward, "data.train_files, data.val_files")
    scores = pool.score_batch(items)
    refused = [
        item
        for item, score in zip(items, scores, strict=True)
        if not score.failed and score.value < 1.0
    ]
    if refused:
        first = refused[0]
        warnings.append(
            f"{len(refused)} of {len(items)} ground truths looked at do not get full marks from "
            f"their own scorer, the first is {str(first.ground_truth)[:80]!r} of "
            f"{first.data_source}: see `rlhf3d data check`"
        )
    failed = [score for score in scores if score.failed]
    if failed:
        warnings.append(
            f"{len(failed)} of {len(items)} ground truths looked at were not scored, the first: "
            f"{failed[0].reason}: see `rlhf3d data check`"
        )
    return warnings


def _shared_questions(train: PromptDataset, val: PromptDataset | None) -> list[str]:
    if val is None:
        return []
    train_questions = {question_key(row) for row in train.sample(LOOKED_AT)}
    shared = train_questions & {question_key(row) for row in val.sample(LOOKED_AT)}
    if not shared:
        return []
    return [
        f"{len(shared)} of the questions looked at are in data.train_files and in data.val_files: "
        "held-out accuracy will flatter (`rlhf3d data prepare --exclude` leaves them out)"
    ]


def stated_truths(rows: Sequence[PromptRow], reward: BuiltinReward, key: str) -> list[ScoreItem]:
    """Completions that state the accepted answers of `rows`.

    ValueError, naming `key`, where a rule cannot compare with one of them.
    """
    if any(row.ground_truth is None for row in rows):
        raise ValueError(f"{key}: {WITHOUT_TRUTH}")
    items = []
    for row in rows:
        try:
            statements = scorer_of(row.data_source, reward.scorers).statements(row.ground_truth)
        except ValueError as error:
            raise ValueError(
                f"{key}: the row that asks {row.question[:80]!r}: {error} (`rlhf3d data check` "
                "names every such row)"
            ) from error
        for text in statements:
            items.append(ScoreItem(row.data_source, text, row.ground_truth, row.extra_info))
    return items
