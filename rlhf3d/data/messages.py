"""The chat messages and tools of a row, read into what a chat template takes.

Invariant: every key of a message reaches the template (role, content, name, tool calls, …); what is not text is
refused. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf3d.tokenizer.chat import Message

NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio", "multi_modal_data")
"""Parts of a row or a message that nothing here takes: refused where there is something in them."""


def read_messages(prompt: Any, where: str) -> list[Message]:
    """Messages as a template takes them: parts of text as one text, keys without a value (parquet fills them) away.

    ValueError, starting with `where`, for what is no list of messages, and for parts that are not text.
    """
    if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) for m in prompt):
        raise _no_messages(prompt, where)
    messages = []
    for number, given in enumerate(prompt):
        message = without_nulls(given)
        for key in NOT_TEXT:
            if message.get(key):
                raise ValueError(
                    f"{where}: message {number} has {key}: prompts are text alone; leave the row out"
                )
        if isinstance(message.get("content"), list):
            message["content"] = _text_of(message["content"], f"{where}: message {number}")
        if message.get("tool_calls"):
            message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        else:
            message.pop("tool_calls", None)
        text = (
            message.setdefault("content", "") if "tool_calls" in message else message.get("content")
        )
        if not isinstance(message.get("role"), str) or not isinstance(text, str):
            raise _no_messages(prompt, where)
        messages.append(message)
    return messages


def read_prompt(prompt: Any, where: str) -> list[Message]:
    """Messages that a completion can follow (see `read_messages`); ValueError for an empty last one."""
    messages = read_messages(prompt, where)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        raise ValueError(
            f"{where}: the prompt ends with an empty message or a tool call of the assistant; leave it out, or add the "
            "tool's answer"
        )
    return messages


def read_tools(tools: Any, where: str) -> list[Any]:
    """Tools as JSON schemas, from structs or JSON text. ValueError, starting with `where`, for others."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: tools is not JSON: {error}") from error
    tools = without_nulls(tools or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: tools must be a list of JSON schemas, not {str(tools)[:80]!r}")
    return tools


def last_request(messages: Sequence[Message]) -> str:
    """The last message that is not the assistant's: what a completion answers."""
    others = [message for message in messages if message["role"] != "assistant"]
    text: str = (others or messages)[-1]["content"]
    return text


def without_nulls(value: Any) -> Any:
    """Structs without the keys that parquet filled with null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _text_of(parts: Sequence[Any], where: str) -> str:
    texts = []
    for part in parts:
        text = (
            part.get("text")
            if isinstance(part, dict) and part.get("type", "text") == "text"
            else part
        )
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(
                f"{where} has a part of type {kind!r}: prompts are text alone; leave the row out"
            )
        texts.append(text)
    return "".join(texts)


def _tool_call(call: Any) -> Any:
    """Arguments as a struct, which templates write as JSON; they come as JSON text too."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        changed = {**function, "arguments": read} if isinstance(read, dict) else function
        return {**call, "function": changed} if "function" in call else changed
    return call


def _no_messages(prompt: Any, where: str) -> ValueError:
    return ValueError(
        f"{where}: prompt must be a list of chat messages with text, "
        f'[{{"role": "user", "content": "..."}}], not {str(prompt)[:80]!r}'
    )
