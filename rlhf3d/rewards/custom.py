"""A user's own reward function: found, checked against what it will be called with, and called.

Invariant: it pickles as its recipe (file, name, arguments), so that any process can load it; a mistake in it is
reported before the run starts. All its coroutines in one process run in one event loop, which stays open between calls:
what the file keeps for them (semaphores, clients) stays usable.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

from rlhf3d.rewards.function import WrongCount
from rlhf3d.rewards.score import ExtraInfo, ScoreItem
from rlhf3d.user_code import Ended, load_function, running

ASYNC_CHUNK = 64
"""Calls of an async function that are under way at once in one process."""
BATCH_CHUNK = 1024
"""Completions that a batch function is given at most at once."""
_SINGLE = ("data_source", "solution_str", "ground_truth", "extra_info")
_BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")


class CustomReward:
    """A user's function and its keyword arguments."""

    memory_gib: float | None = None

    def __init__(
        self, recipe: tuple[str, str, dict[str, Any]], function: Callable[..., Any], batch: bool
    ) -> None:
        self._recipe = recipe
        self._folder = Path(recipe[0]).parent
        self._function = function
        self._batch = batch
        self._async = _is_async(function)
        self.chunk_size = BATCH_CHUNK if batch else ASYNC_CHUNK if self._async else 1

    def __call__(
        self,
        *,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: ExtraInfo = None,
    ) -> Any:
        return self.score_items(
            [ScoreItem(data_source, solution_str, ground_truth, extra_info or {})]
        )[0]

    def score_items(self, items: Sequence[ScoreItem]) -> list[Any]:
        """What the function returns for each; of an async one, an exception may stand in a result's place."""
        with running(self._folder):
            return self._call(items)

    def _call(self, items: Sequence[ScoreItem]) -> list[Any]:
        columns = (
            [i.data_source for i in items],
            [i.solution_str for i in items],
            [i.ground_truth for i in items],
            [i.extra_info for i in items],
        )
        kwargs = self._recipe[2]
        if self._batch:
            results = self._function(**dict(zip(_BATCH, columns, strict=True)), **kwargs)
            return _one_each(
                _loop().run_until_complete(results) if inspect.isawaitable(results) else results,
                items,
            )
        calls = [
            dict(zip(_SINGLE, row, strict=True)) | kwargs for row in zip(*columns, strict=True)
        ]
        results = [self._function(**call) for call in calls]
        if any(map(inspect.isawaitable, results)):
            return _loop().run_until_complete(_gather(results))
        return results

    def __reduce__(self) -> tuple[Callable[..., CustomReward], tuple[str, str, dict[str, Any]]]:
        return _load_to_call, self._recipe


def _load_to_call(path: str, name: str, kwargs: dict[str, Any]) -> CustomReward:
    """The function where it will be called: its file finds the event loop there."""
    _loop()
    return load_custom_reward(path, name, kwargs)


def _one_each(results: Any, items: Sequence[ScoreItem]) -> list[Any]:
    """The scores of a batch; WrongCount where there is not one in order for each completion."""
    expected = (
        f"a batch function returns a list of one score for each of its {len(items)} completions"
    )
    if not isinstance(results, Iterable) or isinstance(results, Mapping | Set | str | bytes):
        raise WrongCount(
            f"the reward function returned {type(results).__name__} {str(results)[:80]!r}; {expected}"
        )
    scores = list(results)
    if len(scores) != len(items):
        raise WrongCount(f"the reward function returned {len(scores)} scores; {expected}")
    return scores


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


async def _gather(results: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*map(_result, results), return_exceptions=True))


async def _result(value: Any) -> Any:
    try:
        return await value if isinstance(value, Awaitable) else value
    except SystemExit as error:
        raise Ended(f"it ends the process: sys.exit({error.code!r})") from error


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def load_custom_reward(
    path: str | Path, name: str = "compute_score", kwargs: dict[str, Any] | None = None
) -> CustomReward:
    """The function `name` of the Python file `path`, to be called with `kwargs` besides the sample.

    It is plain or async, and takes one sample (data_source, solution_str, ground_truth, extra_info) or, as verl's
    batch functions, many (data_sources, solution_strs, ground_truths, extra_infos). Raises ValueError, with the config
    key, for a file that is missing or does not import, a name that is not there, and arguments that do not fit.
    """
    kwargs = dict(kwargs or {})
    file = Path(path).resolve()
    function = load_function(file, name, "custom_reward_function")
    single, batch = (_takes(function, names, kwargs) for names in (_SINGLE, _BATCH))
    if single is not None and batch is not None:
        raise ValueError(
            f"custom_reward_function: {name!r} in {file} must take (data_source, solution_str, ground_truth, "
            f"extra_info=None), or the same in the plural for batches, and the keys of "
            f"custom_reward_function.kwargs {sorted(kwargs)}: {single}"
        )
    return CustomReward((str(file), name, kwargs), function, batch=single is not None)


def _takes(
    function: Callable[..., Any], names: Sequence[str], kwargs: dict[str, Any]
) -> TypeError | None:
    """Why `function` does not take these arguments, or null."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(names), **kwargs)
    except TypeError as error:
        return error
    return None
