"""Whom this process waits for, so that the live view can name them.

Invariant: what `waited` says is being waited for at that moment, by the process's own thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf3d.observability.live.state import Waited

# The waits that are going on; a later one is inside those before it.
_waits: list[Waited] = []


@contextmanager
def waiting_for(wait: Waited) -> Iterator[None]:
    """Have `waited` say inside that these are waited for."""
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.pop()


def waited() -> Waited | None:
    """Whom this process waits for, if anybody; any thread may ask."""
    # Not those inside it: work that goes on meanwhile waits for nothing. As a slice, in one look:
    # the thread that waits may be done between a question and an index.
    for wait in _waits[:1]:
        return wait
    return None
