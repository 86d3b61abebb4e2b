"""What a step works out about itself while its ranks compute: figures and files, in one thread.

Invariant: what is worked out here is what the same call would give in its place, in the order of
the calls, and all of a step's is done, or has raised, before the step is over. Nothing that a rank
waits for comes here.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Aside:
    """Use it as a context: at its end all calls are done, and the first failure is raised."""

    def __init__(self) -> None:
        # One thread: as many operations of torch as before are under way beside those of ranks on
        # the same cores, and files are written in order.
        self._pool = ThreadPoolExecutor(1, "aside")
        self._calls: list[Future[object]] = []

    def start(self, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], R]:
        """Have a call made; what is returned waits for its result, and raises what it raised."""
        future = self._pool.submit(call, *args, **kwargs)
        self._calls.append(future)  # type: ignore[arg-type]
        return future.result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        # What ended the step comes first: its message may name a file that is written here.
        if kind is None:
            for call in self._calls:
                call.result()
