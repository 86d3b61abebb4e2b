"""One call of a reward function, whatever its form, and what it is made of when it fails.

Invariant: as many scores as items, in order; an exception becomes the score of the item that caused it where that is
known, and is raised where one call scored several. Running out of memory is never caught: the process must go.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol

from rlhf3d.rewards.score import MODEL_PART, ExtraInfo, Outcome, Score, ScoreItem

_LARGEST = 3.4028234663852886e38
"""Of 32-bit floats, in which rewards are computed."""
_LONGEST_TEXT, _MOST, _DEEPEST = 2000, 100, 3
"""Characters, entries and levels that are kept of what a reward function returns beside its score."""


class WrongCount(ValueError):
    """A call for several completions returned no score for each: none of what it returned belongs to one of them."""


class RewardFunction(Protocol):
    """What scores one completion: returns a number, a dict with `score`, or a `Score`.

    It may also have `score_items(items)`, which scores several in one call and returns as many results; `chunk_size`,
    how many it wants at most; `prepare()`, called once in each scoring process; `memory_gib`, what one may use;
    `open_end(begun)`, what of the prompt's end it reads before the completion.
    """

    def __call__(
        self,
        *,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: ExtraInfo = None,
    ) -> Any:
        """Score of `solution_str`."""


def prepare(fn: RewardFunction) -> Callable[[Sequence[ScoreItem]], list[Score]]:
    """What a scoring process calls: the scores of items, by a function made ready for it."""
    getattr(fn, "prepare", lambda: None)()
    return partial(score_items, fn)


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


def to_score(result: Any) -> Score:
    """A reward function's return value as a `Score` of plain values, which any process can read.

    ValueError where `score`, or `acc` beside it, is not a finite number. Of what else it returned, numbers keep their
    value, containers their first entries, and all other objects become text.
    """
    if isinstance(result, Score):
        return result
    if not isinstance(result, dict):
        return Score(_finite(result, "the reward function returned"), Outcome.SCORED)
    if "score" not in result:
        raise ValueError(f"the reward function returned no 'score' but {sorted(map(str, result))}")
    number = _finite(result["score"], "the reward function returned score =")
    extra = {_key(key): _plain(item) for key, item in result.items() if key not in ("score", "acc")}
    if "acc" in result:
        extra["acc"] = _finite(result["acc"], "the reward function returned acc =")
    return Score(number, Outcome.SCORED, extra)


def _finite(value: Any, what: str) -> float:
    """A number, also of numpy or torch, that 32 bits can hold."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{what} {type(value).__name__} {str(value)[:80]!r}, not a finite number")
    return number


def _key(key: Any) -> str:
    """A key as text, and not one of those that a reward model's part has."""
    name = str(key)[:_LONGEST_TEXT]
    return f"returned_{name}" if name.startswith(MODEL_PART) else name


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` made of None, booleans, numbers, text, lists and dicts alone, cut to a size that is quick to send."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, bool | int | float):  # a class of the user's own
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, str):
        return str.__str__(value)[:_LONGEST_TEXT]
    if (
        hasattr(value, "tolist") and math.prod(getattr(value, "shape", (_MOST + 1,))) <= _MOST
    ):  # numpy's, torch's
        return _plain(value.tolist(), depth)
    if isinstance(value, Mapping) and depth < _DEEPEST:
        return {_key(key): _plain(item, depth + 1) for key, item in islice(value.items(), _MOST)}
    if isinstance(value, list | tuple | set | frozenset) and depth < _DEEPEST:
        return [_plain(item, depth + 1) for item in islice(value, _MOST)]
    return _shown(value)


def _shown(value: Any) -> str:
    try:
        return str.__str__(repr(value))[:_LONGEST_TEXT]
    except Exception:  # of a class of the user's own
        return f"<{type(value).__name__}>"
