"""Chat messages as tokens, by a model's own chat template.

Invariant: a last message of the assistant is continued, and what a template leaves out can be named. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Message = dict[str, Any]
NEEDED = ("tools", "tool_calls")
"""Parts that a prompt means something else without."""


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Token ids of a conversation."""

    def decode(self, token_ids: Any) -> Any:
        """Text of token ids."""


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
