"""Importing large libraries in less time.

Invariant: the garbage collector is on or off as before, whatever an import raises.
Runs in: driver, training and engine ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Keep the garbage collector from what is imported inside.

    It would look through all that is loaded again and again while more is: for vLLM a fifth of the
    time. Modules live as long as the process, so later collections leave them out too.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
