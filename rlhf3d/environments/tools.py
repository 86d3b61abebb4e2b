"""Functions that the model may call: what it is told about them, and what becomes of its calls.

Invariant: a call of the model's never fails the trajectory: whatever goes wrong in it is counted
and answered with a short error, from which the model can learn.
Runs in: the process of one trajectory; schemas are made in the driver.
"""

from __future__ import annotations

import inspect
import json
from asyncio import CancelledError
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf3d.data.messages import NOT_TEXT
from rlhf3d.environments.api import TOOL_COUNTS, EnvironmentFault
from rlhf3d.environments.calling import results_of
from rlhf3d.environments.parsers import Parser, ToolCall, Unparsable
from rlhf3d.tokenizer.chat import Message
from rlhf3d.user_code import raises_ended

UNREAD = "unparsable_call"
"""Name in the answer to a call that could not be read: some templates demand one."""
_LONGEST_ERROR = 500
"""Characters of an error that the model is shown."""
_Made = tuple[str, str]
"""The outcome of a call, and its answer."""


@dataclass(frozen=True)
class Answers:
    """What the tools answered to one turn of the model."""

    messages: tuple[Message, ...]
    counts: dict[str, int]


class Toolbox:
    """The tools of one trajectory, by name, and how calls of them are read."""

    def __init__(self, tools: Mapping[str, Callable[..., Any]], parse: Parser) -> None:
        self._tools = tools
        self._parse = parse

    def answer(self, text: str) -> Answers | None:
        """Make the calls in what the model said, in order; null where there is none.

        Async ones that follow one another run at the same time; any other call begins when those
        before it have ended.
        """
        calls = self._parse(text) if self._tools else []
        if not calls:
            return None
        made: dict[int, _Made] = {}
        running: dict[int, Awaitable[Any]] = {}
        for number, call in enumerate(calls):
            if not self._is_async(call):
                made |= _end(running, calls)
                running = {}
            begun = self._begin(call)
            if isinstance(begun, tuple):
                made[number] = begun
            else:
                running[number] = begun
        made |= _end(running, calls)
        counts: Counter[str] = Counter()
        messages: list[Message] = []
        for number, call in enumerate(calls):
            outcome, content = made[number]
            counts[outcome] += 1
            name = call.name if isinstance(call, ToolCall) else UNREAD
            messages.append({"role": "tool", "name": name, "content": content})
        return Answers(tuple(messages), {outcome: counts[outcome] for outcome in TOOL_COUNTS})

    def _is_async(self, call: ToolCall | Unparsable) -> bool:
        tool = self._tools.get(call.name) if isinstance(call, ToolCall) else None
        return inspect.iscoroutinefunction(tool)

    def _begin(self, call: ToolCall | Unparsable) -> _Made | Awaitable[Any]:
        """The outcome and the answer of a call; of an async one, what is to be waited for."""
        if isinstance(call, Unparsable):
            return "unparsable", _error(call.reason)
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools)
            return "unknown", _error(f"no tool {call.name!r}; there are: {known}")
        try:
            inspect.signature(tool).bind(**call.arguments)
        except TypeError as error:
            return "wrong", _error(str(error))
        try:
            with raises_ended():
                result = tool(**call.arguments)
        except MemoryError:
            raise  # the process must go
        except Exception as error:
            return _raised(error)
        if inspect.isawaitable(result):
            return result
        return _returned(result, call.name)


def _end(running: Mapping[int, Awaitable[Any]], calls: Sequence[Any]) -> dict[int, _Made]:
    """The outcomes and answers of calls, by number, that run at the same time."""
    made: dict[int, _Made] = {}
    if not running:
        return made
    for number, result in zip(running, results_of(list(running.values())), strict=True):
        # A call that cancels itself is a mistake like any other.
        if isinstance(result, (Exception, CancelledError)):
            made[number] = _raised(result)
        else:
            made[number] = _returned(result, calls[number].name)
    return made


def _raised(error: BaseException) -> _Made:
    return "wrong", _error(str(error) or type(error).__name__)


def _returned(result: Any, name: str) -> _Made:
    # Some of it may not be Unicode, as names of files may be.
    return "right", _text_of(result, name).encode("utf-8", "replace").decode()


def schema_of(tool: Callable[..., Any], where: str) -> dict[str, Any]:
    """The JSON schema of a function, from its annotations and docstring.

    ValueError, naming `where`, for what they lack.
    """
    # Here and not above: the processes of trajectories have no use for transformers.
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        _check_signature(tool)
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # its own kinds, and whatever a user's annotations raise
        raise ValueError(
            f"{where}: {error}; a tool has annotated arguments, and a docstring that says what it "
            "does and describes each argument below a line `Args:`"
        ) from error
    return schema


def tools_of(functions: Sequence[tuple[str, Callable[..., Any]]], where: str) -> dict[str, Any]:
    """Tools by name; ValueError, naming `where`, for two of one name."""
    tools: dict[str, Any] = {}
    for name, function in functions:
        if name in tools:
            raise ValueError(f"{where}: two tools are called {name!r}; rename one")
        tools[name] = function
    return tools


def _check_signature(tool: Callable[..., Any]) -> None:
    """ValueError for arguments that the model cannot give by name."""
    if not inspect.getdoc(tool):
        raise ValueError("it has no docstring")
    for parameter in inspect.signature(tool).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"its argument {parameter} has no name of its own to be given by")


def _text_of(result: Any, name: str) -> str:
    """A tool's result as text: JSON where it is not text."""
    if isinstance(result, str):
        return result
    if isinstance(result, list) and any(map(_is_media, result)):
        raise EnvironmentFault(f"the tool {name} returned an image or the like: text alone works")
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in NOT_TEXT


def _error(text: str) -> str:
    text = text[:_LONGEST_ERROR].encode("utf-8", "replace").decode()
    return json.dumps({"error": text}, ensure_ascii=False)
