"""Chat messages of a row, and their tokens by a model's own chat template.

Invariant: all that a prompt consists of reaches the template: roles, texts, names, tool calls, tools. What is not text
is refused, a last message of the assistant is continued, and what a template leaves out is refused or counted. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
NEEDED = ("tools", "tool_calls")
"""Parts that a prompt means something else without."""
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


def asked(messages: Sequence[Message]) -> str:
    """The last message that is not the assistant's: what a completion answers."""
    others = [message for message in messages if message["role"] != "assistant"]
    text: str = (others or messages)[-1]["content"]
    return text


def tokenise(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> tuple[int, ...]:
    """Token ids of a prompt; where it ends with the assistant's words, what follows goes on with them."""
    goes_on = messages[-1]["role"] == "assistant"
    options: dict[str, Any] = (
        {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
    )
    return _template(tokenizer, messages, tools, **options)


def begun(
    tokenizer: Any, messages: Sequence[Message], ids: Sequence[int], tools: Sequence[Any] = ()
) -> str:
    """What the prompt `ids` holds of the answer already: the template's opening, and the assistant's last words."""
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not before:
        return str(tokenizer.decode(list(ids)))
    asked_ids = _template(tokenizer, before, tools, add_generation_prompt=False)
    differing = [
        place
        for place, (one, other) in enumerate(zip(ids, asked_ids, strict=False))
        if one != other
    ]
    shared = differing[0] if differing else min(len(ids), len(asked_ids))
    return str(tokenizer.decode(list(ids[shared:])))


def left_out(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[str]:
    """Names of the parts, other than role and content, without which the prompt's tokens are the same."""
    keys = {key for message in messages for key in message} - {"role", "content"}
    if not keys and not tools:
        return []
    ids = tokenise(tokenizer, messages, tools)
    found = ["tools"] if tools and _same(tokenizer, messages, (), ids) else []
    for key in sorted(keys):
        bare = [
            {name: value for name, value in message.items() if name != key} for message in messages
        ]
        if _same(tokenizer, bare, tools, ids):
            found.append(key)
    return found


def _same(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], ids: tuple[int, ...]
) -> bool:
    try:
        return tokenise(tokenizer, messages, tools) == ids
    except Exception:  # the template needs the part
        return False


def _template(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], **options: Any
) -> tuple[int, ...]:
    given = {"tools": list(tools)} if tools else {}
    return tuple(
        tokenizer.apply_chat_template(list(messages), return_dict=False, **given, **options)
    )


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
