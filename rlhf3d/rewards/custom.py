"""A user's own reward function: found, checked against what it will be called with, and called.

Invariant: it pickles as its recipe (file, name, arguments), so that any process can load it; a mistake in it is told
before the run starts.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf3d.rewards.scoring import ExtraInfo, ScoreItem

ASYNC_CHUNK = 64
"""Calls of an async function that are under way at once in one process."""
BATCH_CHUNK = 1024
"""Completions that a batch function is given at most at once."""
_SINGLE = ("data_source", "solution_str", "ground_truth", "extra_info")
_BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")


class CustomReward:
    """A user's function and its keyword arguments."""

    memory_gib: float | None = None

    def __init__(self, recipe: tuple[str, str, dict[str, Any]], function: Callable[..., Any], batch: bool) -> None:
        self._recipe = recipe
        self._function = function
        self._batch = batch
        self._async = _is_async(function)
        self.chunk_size = BATCH_CHUNK if batch else ASYNC_CHUNK if self._async else 1

    def __call__(self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: ExtraInfo = None) -> Any:
        return self.score_items([ScoreItem(data_source, solution_str, ground_truth, extra_info or {})])[0]

    def score_items(self, items: Sequence[ScoreItem]) -> list[Any]:
        """What the function returns for each; of an async one, an exception may stand in a result's place."""
        columns = (
            [i.data_source for i in items],
            [i.solution_str for i in items],
            [i.ground_truth for i in items],
            [i.extra_info for i in items],
        )
        kwargs = self._recipe[2]
        if self._batch:
            results = self._function(**dict(zip(_BATCH, columns, strict=True)), **kwargs)
            results = list(asyncio.run(results) if inspect.iscoroutine(results) else results)
            if len(results) != len(items):
                raise ValueError(f"the reward function returned {len(results)} scores for {len(items)} completions")
            return results
        calls = [dict(zip(_SINGLE, row, strict=True)) | kwargs for row in zip(*columns, strict=True)]
        if self._async:
            return asyncio.run(_gather(self._function, calls))
        return [self._function(**call) for call in calls]

    def __reduce__(self) -> tuple[Callable[..., CustomReward], tuple[str, str, dict[str, Any]]]:
        return load_custom_reward, self._recipe


async def _gather(function: Callable[..., Any], calls: list[dict[str, Any]]) -> list[Any]:
    return list(await asyncio.gather(*(function(**call) for call in calls), return_exceptions=True))


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


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


def load_function(file: Path, name: str, key: str) -> Callable[..., Any]:
    """The function `name` of a Python file; ValueError, naming `key`.path or `key`.name, where there is none."""
    function = getattr(module := import_file(file, key), name, None)
    if function is None:
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else "; it defines no function"
        raise ValueError(f"{key}.name: no {name!r} in {file}{hint}")
    if not callable(function):
        raise ValueError(f"{key}.name: {name!r} in {file} is a {type(function).__name__}, not callable")
    loaded: Callable[..., Any] = function
    return loaded


def _takes(function: Callable[..., Any], names: Sequence[str], kwargs: dict[str, Any]) -> TypeError | None:
    """Why `function` does not take these arguments, or null."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(names), **kwargs)
    except TypeError as error:
        return error
    return None


def import_file(file: Path, key: str) -> Any:
    """A Python file as a module; ValueError, naming `key`.path, where that fails."""
    if not file.is_file():
        raise ValueError(f"{key}.path: no such file: {file}")
    module_name = f"rlhf3d_{key.replace('.', '_')}_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{key}.path: {file} is not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{key}.path: {file} does not import: {type(error).__name__}: {error}") from error
    return module
