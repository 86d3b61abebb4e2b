"""Which errors are the user's to read, and which are faults of this code.

Invariant: only what a `raise` of this package says is shown without a traceback.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import rlhf3d

PACKAGE = Path(rlhf3d.__file__).parent


def raised_by_us(error: Exception) -> bool:
    """Whether a `raise` of this package made the error.

    Not a library below it, and not a mistake in our own code.
    """
    # The frame where the error was made: in a library it has the library's file.
    last = traceback.extract_tb(error.__traceback__)[-1]
    of_package = Path(last.filename).is_relative_to(PACKAGE)
    # A mistake of ours (an index, a None) ends in our file too, but on a line without `raise`.
    return of_package and (last.line or "").startswith("raise")
