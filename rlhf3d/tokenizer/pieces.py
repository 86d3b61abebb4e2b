"""The text of each token: for people, who see who wrote it.

Invariant: the pieces, joined, are the text of all tokens, special ones included. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, so at most as many tokens."""


def pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """A text for each token.

    Where a character is spread over several tokens, the last of them has it and the others have
    nothing.
    """
    ids, texts = tuple(token_ids), []

    @cache
    def decode(ids: tuple[int, ...]) -> str:
        # Without the clean-up, which would remove spaces before punctuation.
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    # Decoded with the token before it: some tokenizers drop the space that begins a text.
    before = done = 0
    for end in range(1, len(ids) + 1):
        known, text = decode(ids[before:done]), decode(ids[before:end])
        incomplete = text.endswith("\ufffd") and end - done < _LONGEST_CHARACTER
        if incomplete and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        before, done = done, end
    return texts
