"""One call of a reward function, whatever its form, and what it is made of when it fails.

Invariant: as many scores as items, in order; an exception becomes the score of the item that caused it where that is
known, and is raised where one call scored several. Running out of memory is never caught: the process must go.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from rlhf3d.rewards.scoring import Outcome, RewardFunction, Score, ScoreItem, WrongCount, to_score


def score_items(fn: RewardFunction, items: Sequence[ScoreItem]) -> list[Score]:
    """The score of each item; raises where one call for several failed as a whole."""
    many = getattr(fn, "score_items", None)
    if many is None:
        return [_score_one(fn, item) for item in items]
    try:
        results = many(items)
    except WrongCount as error:  # halves of them would only hide it
        return [_failure(error)] * len(items)
    except BaseException as error:  # SystemExit and KeyboardInterrupt of the function's own too
        if isinstance(error, MemoryError) or len(items) > 1:
            raise
        return [_failure(error)]
    return [_result(result) for result in results]


def _score_one(fn: RewardFunction, item: ScoreItem) -> Score:
    begun = getattr(fn, "open_end", lambda text: "")(item.begun)
    try:
        result = fn(
            data_source=item.data_source,
            solution_str=begun + item.solution_str,
            ground_truth=item.ground_truth,
            extra_info=item.extra_info,
        )
    except MemoryError:
        raise
    except BaseException as error:
        return _failure(error)
    return _result(result)


def _result(result: Any) -> Score:
    """A return value as a score that can be sent to another process."""
    if isinstance(result, BaseException):
        return _failure(result)
    try:
        return to_score(result)
    except MemoryError:
        raise
    except Exception as error:
        return _failure(error)


def _failure(error: BaseException) -> Score:
    return Score(0.0, Outcome.ERROR, message="".join(traceback.format_exception(error)))
