"""A text file that is there complete or not at all.

Invariant: a kill or an error leaves the file as it was; its folder need not exist before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write the file inside; it gets its name, in place of a former one, at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # UTF-8 cannot hold half a surrogate pair, which a completion may have; JSON reads its escape.
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield file
    os.replace(partial, path)
