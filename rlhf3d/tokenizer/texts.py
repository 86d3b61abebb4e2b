"""What a model wrote as text, without special tokens: for scoring and for people.

Invariant: never trained on. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def plain_texts(tokenizer: Any, written: Sequence[Sequence[int]]) -> list[str]:
    """Of each sequence of tokens its text."""
    if not written:  # of an empty list the tokenizer makes one text
        return []
    # As arrays of numpy: of a list the tokenizer looks at each number in Python.
    ids = [np.array(tokens, dtype=np.int64) for tokens in written]
    # Special tokens: most completions end with one, such as the end of the turn.
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts
