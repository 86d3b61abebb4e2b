"""What a score is, which function gives it, and when too many are missing.

Invariant: every completion ends as exactly one `Outcome`; only `scored` and `unparsable` count as the
model's doing, and a share of `error` and `timeout` above reward.max_error_rate stops the run.
Imports nothing heavy: the scoring processes load this module.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from rlhf3d.rewards import gsm8k

ExtraInfo = dict[str, Any] | None
_MESSAGE_LINES = 25
"""Lines of one failure's message that fit a screen."""


class Outcome(StrEnum):
    """How the scoring of one completion ended."""

    SCORED = "scored"
    UNPARSABLE = "unparsable"
    """The completion holds no answer; worth 0."""
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Score:
    """Value and outcome of one completion; 0 unless scored."""

    value: float
    outcome: Outcome
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the reward function returned; `answer` from the built-in scorers."""
    message: str | None = None
    """The sample and the traceback, of an error or timeout."""

    @property
    def failed(self) -> bool:
        """Whether the reward function gave no verdict."""
        return self.outcome in (Outcome.TIMEOUT, Outcome.ERROR)


@dataclass(frozen=True)
class ScoreItem:
    """One completion to score."""

    data_source: str
    solution_str: str
    """Text of the completion, without the prompt."""
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


class RewardError(RuntimeError):
    """The reward function failed too often, or could not be loaded by the scoring processes."""


class RewardFunction(Protocol):
    """What scores one completion: returns a number, a dict with `score`, or a `Score`."""

    def __call__(self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: ExtraInfo = None) -> Any:
        """Score of `solution_str`."""


def _score_gsm8k(solution_str: str, ground_truth: Any, method: str) -> Score:
    result = gsm8k.compute_score(solution_str, str(ground_truth), method)
    outcome = Outcome.UNPARSABLE if result.answer is None else Outcome.SCORED
    return Score(result.score, outcome, {"answer": result.answer})


SCORERS: dict[str, Callable[[str, Any, str], Score]] = {
    "openai/gsm8k": _score_gsm8k,
    "rlhf3d/arithmetic": _score_gsm8k,
}
"""Built-in scorer of each data source: fn(solution_str, ground_truth, method)."""


def check_data_sources(data_sources: Iterable[str]) -> None:
    """ValueError for the first data source without a built-in scorer."""
    for data_source in data_sources:
        if data_source not in SCORERS:
            raise ValueError(
                f"no built-in scorer for data_source {data_source!r} (known: {', '.join(SCORERS)}); "
                "set custom_reward_function.path to score it yourself"
            )


@dataclass(frozen=True)
class BuiltinReward:
    """The scorer registered for each row's data source."""

    method: str = "flexible"
    """reward.method: how gsm8k's answers are extracted."""

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: ExtraInfo = None
    ) -> Score:
        check_data_sources([data_source])
        return SCORERS[data_source](solution_str, ground_truth, self.method)


class CustomReward:
    """A user's function and its keyword arguments; pickled as its recipe, so any process can load it."""

    def __init__(self, path: str, name: str, kwargs: dict[str, Any], function: Callable[..., Any]) -> None:
        self._recipe = (path, name, kwargs)
        self._function = function

    def __call__(self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: ExtraInfo = None) -> Any:
        return self._function(
            data_source=data_source,
            solution_str=solution_str,
            ground_truth=ground_truth,
            extra_info=extra_info,
            **self._recipe[2],
        )

    def __reduce__(self) -> tuple[Callable[..., CustomReward], tuple[str, str, dict[str, Any]]]:
        return load_custom_reward, self._recipe


def load_custom_reward(
    path: str | Path, name: str = "compute_score", kwargs: dict[str, Any] | None = None
) -> CustomReward:
    """The function `name` of the Python file `path`, to be called with `kwargs` besides the sample.

    Raises ValueError, with the config key, for a file that is missing or does not import, a name that is
    not there or not a plain function, and for arguments that it does not take.
    """
    kwargs = dict(kwargs or {})
    file = Path(path).resolve()
    function = getattr(module := _import_file(file), name, None)
    if function is None:
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else "; it defines no function"
        raise ValueError(f"custom_reward_function.name: no {name!r} in {file}{hint}")
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"custom_reward_function.name: {name!r} in {file} is a {kind}, not callable")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"custom_reward_function.name: {name!r} in {file} is async; make it plain")
    try:
        inspect.signature(function).bind(data_source="", solution_str="", ground_truth="", extra_info=None, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"custom_reward_function: {name!r} in {file} must take (data_source, solution_str, ground_truth, "
            f"extra_info=None) and the keys of custom_reward_function.kwargs {sorted(kwargs)}: {error}"
        ) from error
    return CustomReward(str(file), name, kwargs, function)


def _import_file(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"custom_reward_function.path: no such file: {file}")
    module_name = f"rlhf3d_custom_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"custom_reward_function.path: {file} is not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"custom_reward_function.path: {file} does not import: {type(error).__name__}: {error}"
        ) from error
    return module


def to_score(result: Any) -> Score:
    """A reward function's return value as a `Score`; ValueError where it holds no finite number."""
    if isinstance(result, Score):
        return result
    extra: dict[str, Any] = {}
    value = result
    if isinstance(result, dict):
        if "score" not in result:
            raise ValueError(f"the reward function returned no 'score' but {sorted(map(str, result))}")
        extra = {key: item for key, item in result.items() if key != "score"}
        value = result["score"]
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the reward function returned {str(value)[:80]!r}, not a finite number")
    return Score(number, Outcome.SCORED, extra)


def check_outcomes(scores: Sequence[Score], max_error_rate: float, total: int | None = None) -> None:
    """RewardError where more than `max_error_rate` of `total` completions (null: of `scores`) failed."""
    failures = [score for score in scores if score.failed]
    total = len(scores) if total is None else total
    if len(failures) <= max_error_rate * total:
        return
    counts = Counter(score.outcome.value for score in scores)
    counted = ", ".join(f"{counts[outcome.value]} {outcome.value}" for outcome in Outcome)
    raise RewardError(
        f"{len(failures)} of {total} completions were not scored ({counted}); reward.max_error_rate="
        f"{max_error_rate} allows {math.floor(max_error_rate * total)}. The first:\n"
        f"{_one_screen(failures[0].message or 'no message')}\n"
        "Mend the reward function, or raise reward.timeout_s or reward.max_error_rate."
    )


def _one_screen(message: str) -> str:
    lines = [line[:200] for line in message.splitlines()]
    if len(lines) <= _MESSAGE_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:4], "  ...", *lines[5 - _MESSAGE_LINES :]])
