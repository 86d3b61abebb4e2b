"""Tools: their schemas, and what becomes of the model's calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.environments import PROMPT, contents, load, reset, step

from rlhf3d.environments.api import EnvironmentFault, Finish
from rlhf3d.environments.load import Environments

TOOLS = """
    import asyncio, sys
    made = []
    def multiply(a: int, b: int = 2) -> int:
        '''Multiply two numbers.

        Args:
            a: The first.
            b: The second.
        '''
        made.append("multiply")
        return a * b
    async def slowly(text: str) -> str:
        '''Say it again.

        Args:
            text: What to say.
        '''
        await asyncio.sleep(0)
        return text
    def give(what: str):
        '''Give something.

        Args:
            what: A Python expression.
        '''
        return eval(what)
    def leave():
        '''Leave.'''
        sys.exit(1)
"""
ALL = ("multiply", "slowly", "give", "leave")


def call(name: str, **arguments: Any) -> str:
    """A call as Hermes models write it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def begun(folder: Path, code: str = TOOLS, **settings: Any) -> Environments:
    """A trajectory with the tools."""
    environments = load(folder, code, **{"tools": ALL, **settings})
    reset(environments)
    return environments


def counts(right: int = 0, wrong: int = 0, unknown: int = 0, unparsable: int = 0) -> dict[str, int]:
    return {"right": right, "wrong": wrong, "unknown": unknown, "unparsable": unparsable}


def test_tools_alone(tmp_path: Path) -> None:
    tools = load(tmp_path, TOOLS, tools=ALL)
    assert tools.name_of({}) is None
    start = reset(tools)
    assert start.prompt == tuple(PROMPT) and start.record == {}
    reply = step(tools, f"I multiply. {call('multiply', a=3, b=4)} and {call('slowly', text='x')}")
    assert reply.messages == (
        {"role": "tool", "name": "multiply", "content": "12"},
        {"role": "tool", "name": "slowly", "content": "x"},
    )
    assert reply.tool_calls == counts(right=2) and not reply.done and reply.reward is None
    end = step(tools, "It is 12.")
    assert end.done and end.messages == () and end.reward is None and end.tool_calls == {}
    assert tools(Finish()).done


@pytest.mark.parametrize(
    ("text", "outcome", "part"),
    [
        (call("multiply", a=3), "right", "6"),
        (call("multiply"), "wrong", "'a'"),
        (call("multiply", a=1, b=2, c=3), "wrong", "'c'"),
        (call("multiply", a=[1], b="x"), "wrong", "error"),
        (call("give", what="1 / 0"), "wrong", "division by zero"),
        (call("leave"), "wrong", "sys.exit(1)"),
        (call("divide", a=1), "unknown", "multiply, slowly, give, leave"),
        ("<tool_call>multiply(3, 4)</tool_call>", "unparsable", "JSON"),
    ],
)
def test_each_call_is_counted_and_answered(
    tmp_path: Path, text: str, outcome: str, part: str
) -> None:
    reply = step(begun(tmp_path), text)
    assert reply.tool_calls == {**counts(), outcome: 1} and not reply.done
    (message,) = reply.messages
    assert message["role"] == "tool" and part in message["content"]
    assert message["name"], "templates may demand one, also of a call that could not be read"
    if outcome != "right":
        assert list(json.loads(message["content"])) == ["error"]


def test_calls_are_made_in_order_after_a_wrong_one(tmp_path: Path) -> None:
    text = call("give", what="made") + call("nothing") + call("multiply", a=1)
    text += call("give", what="made")
    reply = step(begun(tmp_path), text)
    assert reply.tool_calls == counts(right=3, unknown=1)
    assert [contents(reply.messages)[i] for i in (0, 2, 3)] == ["[]", "2", '["multiply"]']


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("'é'", "é"),
        ("{'a': ['é', None, 1.5]}", '{"a": ["é", null, 1.5]}'),
        ("None", "null"),
        ("True", "true"),
        ("{1, 1}", "{1}"),
        ("chr(0xD83D)", "?"),
        ("[{'type': 'text', 'text': 'x'}]", '[{"type": "text", "text": "x"}]'),
    ],
)
def test_results_are_text_or_json(tmp_path: Path, value: str, text: str) -> None:
    assert contents(step(begun(tmp_path), call("give", what=value)).messages) == [text]


def test_an_error_is_unicode(tmp_path: Path) -> None:
    what = "(_ for _ in ()).throw(ValueError(chr(0xD83D)))"
    assert contents(step(begun(tmp_path), call("give", what=what)).messages) == ['{"error": "?"}']


def test_a_long_error_is_short(tmp_path: Path) -> None:
    reply = step(begun(tmp_path), call("give", what="{}['" + "x" * 10_000 + "']"))
    assert reply.tool_calls == counts(wrong=1) and len(reply.messages[0]["content"]) < 600


def test_images_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="give returned an image"):
        step(begun(tmp_path), call("give", what="[{'type': 'image', 'image': 1}]"))


def test_memory_is_not_caught(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        step(begun(tmp_path), call("give", what="1 if 0 else (_ for _ in ()).throw(MemoryError())"))


def test_a_class_with_step_gets_what_calls_no_tool(tmp_path: Path) -> None:
    code = (
        TOOLS
        + """
    class Game:
        def reset(self): self.heard = []
        def step(self, text):
            self.heard.append(text)
            return None, 1.0, True
    """
    )
    game = begun(tmp_path, code, name="Game", tools=("multiply",))
    assert step(game, call("multiply", a=1)).record == {"heard": []}
    assert step(game, "two").record == {"heard": ["two"]}
    plain = begun(tmp_path, code, name="Game", tools=())
    assert step(plain, call("multiply", a=1)).record["heard"] == [call("multiply", a=1)]


def test_formats(tmp_path: Path) -> None:
    llama = begun(tmp_path, tool_format="llama3")
    text = '{"name": "multiply", "parameters": {"a": 4}}'
    assert contents(step(llama, text).messages) == ["8"]
    parser = tmp_path / "mine.py"
    parser.write_text(
        "def parse(text):\n"
        "    name, _, number = text.partition(' ')\n"
        "    return [{'name': name, 'arguments': {'a': int(number)}}] if number else []\n"
    )
    own = begun(tmp_path, tool_format=f"{parser}:parse")
    assert contents(step(own, "multiply 5").messages) == ["10"]
    assert step(own, "multiply five").tool_calls == counts(unparsable=1)
    assert step(own, "done").done


@pytest.mark.parametrize(
    ("tool_format", "part"),
    [("xml", "hermes, llama3"), ("none.py:parse", "no such file"), ("{file}:parse", "no 'parse'")],
)
def test_a_format_that_is_none(tmp_path: Path, tool_format: str, part: str) -> None:
    tool_format = tool_format.format(file=tmp_path / "games.py")
    with pytest.raises(ValueError, match=r"environment\.tool_format") as raised:
        load(tmp_path, TOOLS, tools=ALL, tool_format=tool_format)
    assert part in str(raised.value)


def test_schemas(tmp_path: Path) -> None:
    schemas = load(tmp_path, TOOLS, tools=("slowly", "multiply")).schemas(None)
    assert [schema["function"]["name"] for schema in schemas] == ["slowly", "multiply"]
    multiply = schemas[1]["function"]
    assert multiply["description"] == "Multiply two numbers."
    assert multiply["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first."},
            "b": {"type": "integer", "description": "The second."},
        },
        "required": ["a"],
    }


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("def tool(a: int): return a", "no docstring"),
        ("def tool(a: int):\n    '''It.'''", "'a'"),
        ("def tool(a):\n    '''It.\n\n    Args:\n        a: One.\n    '''", "a is missing a type"),
        ("def tool(a: 'Nothing'):\n    '''It.\n\n    Args:\n        a: One.\n    '''", "Nothing"),
        ("def tool(*a: int):\n    '''It.\n\n    Args:\n        a: One.\n    '''", "*a"),
        ("def tool(**a: int):\n    '''It.\n\n    Args:\n        a: One.\n    '''", "**a"),
    ],
)
def test_what_a_tool_lacks(tmp_path: Path, code: str, part: str) -> None:
    with pytest.raises(ValueError, match=r"environment\.tools: tool") as raised:
        load(tmp_path, code, tools=("tool",)).schemas(None)
    assert part in str(raised.value) and "`Args:`" in str(raised.value)


def test_a_tool_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"environment\.tools: no 'divide'"):
        load(tmp_path, TOOLS, tools=("divide",))


def test_two_tools_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"environment\.tools: two tools.*'multiply'"):
        load(tmp_path, TOOLS, tools=("multiply", "multiply"))


MEETING = """
    import asyncio
    arrived, said = [], []
    async def meet(who: str, fails: bool = False) -> str:
        '''Wait for the other one.

        Args:
            who: Who comes.
            fails: Whether it goes wrong.
        '''
        arrived.append(who)
        for _ in range(1000):
            if len(arrived) >= 2:
                break
            await asyncio.sleep(0.001)
        # The first to come is the last to leave.
        await asyncio.sleep(0.02 if who == arrived[0] else 0.0)
        said.append(who)
        if fails:
            raise KeyError(who)
        return f"{who}: {len(arrived)} came"
    async def cancel():
        '''Give up.'''
        asyncio.current_task().cancel()
        await asyncio.sleep(0)
    def report() -> list:
        '''Who has left so far.'''
        return list(said)
"""
"""A call of `meet` is back at once where another one runs at the same time."""


def test_async_calls_of_a_turn_run_at_the_same_time_and_are_answered_in_order(
    tmp_path: Path,
) -> None:
    tools = begun(tmp_path, MEETING, tools=("meet", "cancel", "report"))
    calls = [
        call("meet", who="a"),
        call("meet", who="b", fails=True),
        call("cancel"),
        call("meet", who="c"),
        call("report"),
        call("meet", who="d"),
    ]
    reply = step(tools, " ".join(calls))
    a, b, cancelled, c, report, d = contents(reply.messages)
    assert a == "a: 3 came" and c == "c: 3 came" and d == "d: 4 came"
    assert "b" in json.loads(b)["error"] and "error" in json.loads(cancelled)
    # A plain call begins when those before it have ended, and ends before those behind it begin.
    assert sorted(json.loads(report)) == ["a", "b", "c"] and json.loads(report)[-1] == "a"
    assert reply.tool_calls == counts(right=4, wrong=2)
