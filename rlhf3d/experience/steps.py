"""Work that waits, as generators that say what they wait for.

Invariant: the driver has one thread. In the foreground work is run to its end, and its waits block;
in the background, while the driver waits for training ranks, it goes on as far as it can without a
wait. What it makes does not depend on which.
Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")

Steps = Generator[str, None, T]
"""Work that yields the name of the phase in which it goes on; what it returns is its result."""

BRIEF_S = 0.02
"""Seconds that one may wait while others have something to do as well."""
FIRST_PHASE = "generate"
"""In which all such work begins."""

Phase = Callable[[str], AbstractContextManager[Any]]
"""What times a phase of a step and shows its name."""


def untimed(name: str) -> AbstractContextManager[Any]:
    """A `Phase` of nothing: for what is itself a part of one."""
    return nullcontext()


def finish(steps: Steps[T], phase: Phase = untimed) -> T:
    """Run work to its end, each part of it in the phase that it named before."""
    name = FIRST_PHASE
    try:
        while True:
            with phase(name):
                asked = name
                while name == asked:
                    name = next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()  # where a phase or Ctrl-C ended it: it gives back what it holds


class Patience:
    """How long whoever makes experience may wait for engines, environments and scorers."""

    def __init__(self) -> None:
        self.background = False
        """Whether the driver has something else to wait for."""
        self.meanwhile: Callable[[], bool] | None = None
        """What else there is to do in the foreground; it waits for nothing, and says whether there
        is more of it."""

    def of(self, seconds: float) -> float:
        """The seconds that a wait may block of those it would."""
        if self.background:
            return 0.0
        if self.meanwhile is not None and self.meanwhile():
            return min(seconds, BRIEF_S)
        return seconds

    @contextmanager
    def none(self) -> Iterator[None]:
        """Let nothing block within the body."""
        before, self.background = self.background, True
        try:
            yield
        finally:
            self.background = before
