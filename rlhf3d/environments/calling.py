"""Plain and async code of the user's, called alike.

Invariant: all coroutines of one process run in one event loop, made in that process: a loop must
not be shared with the process it was forked from.
Runs in: the process of one trajectory.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Sequence
from functools import cache
from typing import Any

from rlhf3d.user_code import raises_ended


def result_of(value: Any) -> Any:
    """What a call returned; what it returned in the end where it is async."""
    if not inspect.isawaitable(value):
        return value
    return _loop(os.getpid()).run_until_complete(_await(value))


def results_of(values: Sequence[Awaitable[Any]]) -> list[Any]:
    """What several async calls return, which run at the same time, or the exceptions they raise.

    In the order of `values`; MemoryError is raised.
    """
    results: list[Any] = _loop(os.getpid()).run_until_complete(_gather(values))
    for result in results:
        if isinstance(result, MemoryError):
            raise result
    return results


@cache
def _loop(_pid: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


async def _await(value: Awaitable[Any]) -> Any:
    with raises_ended():  # asyncio would end the loop at a SystemExit
        return await value


async def _gather(values: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_await, values), return_exceptions=True)
