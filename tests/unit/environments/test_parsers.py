"""Tool calls in a model's text, in each format, also where the text is broken."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf3d.environments.api import EnvironmentFault
from rlhf3d.environments.parsers import (
    PARSERS,
    ToolCall,
    Unparsable,
    hermes,
    llama3,
    user_parser,
)

ADD = ToolCall("add", {"a": 1, "b": [2, {"c": "}"}]})
MUL = ToolCall("mul", {})
UNPARSABLE = "unparsable"


def found(calls: list[ToolCall | Unparsable]) -> list[Any]:
    """Calls, with the reasons of those that could not be read left out."""
    return [UNPARSABLE if isinstance(call, Unparsable) else call for call in calls]


def tagged(call: ToolCall) -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': call.arguments})}\n</tool_call>"
    )


def llama(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "parameters": call.arguments})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("The answer is 3.", []),
        ("", []),
        (tagged(ADD), [ADD]),
        (f"I add.\n{tagged(ADD)}\n{tagged(MUL)} Then?", [ADD, MUL]),
        ('<tool_call>{"name": "mul"}</tool_call>', [MUL]),
        ('<tool_call>{"name": "mul", "arguments": null}</tool_call>', [MUL]),
        ('<tool_call>{"name": "mul", "arguments": "{}"}</tool_call>', [MUL]),
        (
            '<tool_call>{"name": "say", "arguments": {"a": "x\ny"}}',
            [ToolCall("say", {"a": "x\ny"})],
        ),
        (
            '<tool_call>{"name": "say", "arguments": {"a": "</tool_call>"}}</tool_call>',
            [ToolCall("say", {"a": "</tool_call>"})],
        ),
        ("<tool_call>", [UNPARSABLE]),
        ('<tool_call>{"name": "mul", "argum', [UNPARSABLE]),
        (f"<tool_call>mul(1)</tool_call>{tagged(ADD)}", [UNPARSABLE, ADD]),
        (f'<tool_call>{{"name": {tagged(ADD)}', [UNPARSABLE, ADD]),
        ("<tool_call>[1]</tool_call>", [UNPARSABLE]),
        ("<tool_call>null</tool_call>", [UNPARSABLE]),
        ('<tool_call>{"arguments": {}}</tool_call>', [UNPARSABLE]),
        ('<tool_call>{"name": "mul", "arguments": [1]}</tool_call>', [UNPARSABLE]),
        ('<tool_call>{"name": "mul", "arguments": "x"}</tool_call>', [UNPARSABLE]),
        ('<tool_call>{"name": "mul", "arguments": {"a": "\\ud83d"}}</tool_call>', [UNPARSABLE]),
        (
            '<tool_call>{"name": "mul", "arguments": {"a": "\\ud83d\\ude00"}}</tool_call>',
            [ToolCall("mul", {"a": "😀"})],
        ),
        (f"<think>{tagged(ADD)}</think>{tagged(MUL)}", [MUL]),
        (f"Perhaps {tagged(ADD)}?</think>No.", []),
        (llama(ADD), []),
    ],
)
def test_hermes(text: str, calls: list[Any]) -> None:
    assert found(hermes(text)) == calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("The answer is {3}.", []),
        ('{"answer": 3}', []),
        ('{"name": "Ada"}', []),
        ('{"answer": {"name": "mul", "parameters": {}}}', []),
        (llama(ADD), [ADD]),
        (f"<|python_tag|>{llama(ADD)}<|eom_id|>", [ADD]),
        (f"I add. <|python_tag|>{llama(ADD)}; {llama(MUL)}", [ADD, MUL]),
        (f"{llama(ADD)};{llama(MUL)}", [ADD, MUL]),
        (f"[{llama(ADD)}, {llama(MUL)}]", [ADD, MUL]),
        ('{"type": "function", "name": "mul", "parameters": {}}', [MUL]),
        ('{"name": "mul", "arguments": {}}', [MUL]),
        ('{"parameters": {}, "name": "mul"}', [MUL]),
        (f'{llama(ADD)}; {{"name": "mul", "param', [ADD, UNPARSABLE]),
        ('{"name": "mul", "parameters": {{}}', [UNPARSABLE]),
        ('{"name": "mul", "parameters": 3}', [UNPARSABLE]),
        ("<|python_tag|>mul.call(a=1)", [UNPARSABLE]),
        ('<|python_tag|>{"answer": 3}', [UNPARSABLE]),
        (f"I think of {llama(ADD)}</think>{llama(MUL)}", [MUL]),
    ],
)
def test_llama3(text: str, calls: list[Any]) -> None:
    assert found(llama3(text)) == calls


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|python_tag|>", "{", "}", '"name"', ":", '"a"', "[", "]", ",",
     ";", "parameters", "</think>", "\\", "1e999", " ", tagged(ADD), llama(MUL)]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | st.text(max_size=3), max_size=20))
def test_no_text_breaks_them(pieces: list[str]) -> None:
    for parse in PARSERS.values():
        for call in parse("".join(pieces)):
            assert isinstance(call, ToolCall | Unparsable)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.text()), max_size=4))
def test_what_a_model_writes_is_read(arguments: dict[str, Any]) -> None:
    call = ToolCall("tool", arguments)
    # Special tokens say where calls are, wherever they stand.
    assume(not any(mark in llama(call) for mark in ("</think>", "<|python_tag|>")))
    assert hermes(f"text {tagged(call)} text") == [call]
    assert llama3(f"text {llama(call)} text") == [call]


@pytest.mark.parametrize(
    "text", ['{"a":' * 20_000, "{" * 100_000, "<tool_call>[" * 5_000, '[{"name":"' * 20_000]
)
def test_hostile_texts_take_no_time(text: str) -> None:
    began = time.thread_time()
    for parse in PARSERS.values():
        parse(text)
    assert time.thread_time() - began < 5


def test_a_parser_of_the_users() -> None:
    def parse(text: str) -> Any:
        if text == "broken":
            raise ValueError("two equal signs")
        return eval(text)

    own = user_parser(parse, "mine.py:parse")
    assert own("[{'name': 'mul', 'arguments': {}}]") == [MUL] and own("[]") == []
    assert own("broken") == [Unparsable("two equal signs")]
    assert found(own("[{'name': 'mul', 'arguments': 3}]")) == [UNPARSABLE]
    with pytest.raises(ZeroDivisionError):
        own("1 / 0")
    for wrong in ("None", "['mul']", "[{'arguments': {}}]", "{'name': 'mul'}"):
        with pytest.raises(EnvironmentFault, match=r"mine\.py:parse"):
            own(wrong)
