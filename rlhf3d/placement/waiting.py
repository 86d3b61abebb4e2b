"""Waiting on other processes.

Invariant: every wait has a deadline; its error names the phase, who was waited for, and the first
failure's traceback.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from rlhf3d.observability.live.state import Waited
from rlhf3d.observability.live.waits import waiting_for
from rlhf3d.placement.calls import Reply, start_call

R = TypeVar("R")

GRACE_S = 2.0
"""Seconds to wait for further failures after the first, one of which may be its cause."""
LOOK_S = 1.0
"""Seconds between two looks at whether Ray has ended."""
SHORT_S = 0.1
MEANWHILE_S = 0.005
"""Seconds between two looks at other work while calls are waited for. A turn of an environment
takes three: to see its completion, its reply, and to ask for the next turn."""
NOTICE_S = 15.0
"""Seconds within which Ray notices that a process has died."""
# Empty or one reason, for all waits of this process.
_ended: list[str] = []


class WorkerFailure(RuntimeError):
    """A worker raised, died or did not answer in time."""

    lost_touch: bool = False
    """Whether all that is known is that a process does not answer: its node may be gone."""


def set_ray_ended(why: str | None) -> None:
    """Have every wait on Ray fail from now on, because Ray has ended; None at its start."""
    _ended[:] = [] if why is None else [why]


def ray_ended() -> str | None:
    """Return why Ray has ended, if it has."""
    return _ended[0] if _ended else None


@contextmanager
def exit_on_timeout(what: str, timeout_s: float) -> Iterator[None]:
    """End this process with `what` and exit code 1 when the block takes longer.

    For calls into libraries that wait without a deadline and that no exception or signal ends.
    """

    def end() -> None:
        remedy = "raise it, or see in Ray's own logs what keeps it"
        text = f"{what}: no answer within {timeout_s:g} s (cluster.startup_timeout_s); {remedy}"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def gather(
    phase: str,
    calls: Mapping[str, Reply[R]],
    timeout_s: float,
    meanwhile: Callable[[], bool] | None = None,
) -> list[R]:
    """Return the results of the named calls in their order.

    `meanwhile` is called every MEANWHILE_S; it waits for nothing, and says whether it has more to
    do. Raises WorkerFailure at the first failure or at the deadline.
    """
    pending, results = dict(calls), dict[str, R]()
    began = time.monotonic()
    with waiting_for(Waited(pending, began, timeout_s)):
        while pending:
            left_s = max(0.0, began + timeout_s - time.monotonic())
            if meanwhile is not None and meanwhile():
                left_s = min(left_s, MEANWHILE_S)
            ready = take_ready(phase, pending, left_s)
            if not ready and time.monotonic() >= began + timeout_s:
                raise _no_answer(phase, pending, timeout_s)
            results |= ready
    return [results[name] for name in calls]


def _no_answer(phase: str, pending: Collection[str], timeout_s: float) -> WorkerFailure:
    late = WorkerFailure(
        f"{phase}: no answer within {timeout_s:.0f} s from {', '.join(pending)}; "
        "raise cluster.phase_timeout_s if the work is really that long, or look into logs/"
    )
    late.lost_touch = True
    return late


def take_ready(phase: str, pending: dict[str, Reply[R]], timeout_s: float) -> dict[str, R]:
    """Remove the calls that have ended from `pending`; their results, by name.

    Waits up to `timeout_s` for the first, in turns of LOOK_S: {} may come earlier. Raises
    WorkerFailure where a call failed.
    """
    calls: list[Any] = list(pending.values())
    # In turns of LOOK_S: ray.wait itself does not return when Ray has ended.
    ready, _ = ray.wait(calls, num_returns=1, timeout=min(LOOK_S, timeout_s))
    if why := ray_ended():
        raise WorkerFailure(why)
    if ready:  # others may have ended by now
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
    results: dict[str, R] = {}
    ended = set(ready)  # of a thousand ranks, a list would be compared a million times
    for name in [name for name, call in pending.items() if call in ended]:
        call: Any = pending.pop(name)
        try:
            results[name] = ray.get(call)
        except RayError as error:
            raise _first_failure(phase, {name: error}, pending) from None
    return results


def dead_actors(actors: Mapping[str, Any], answer: Callable[[Any], Any]) -> dict[str, str]:
    """Return those of the named actors whose processes have died, and what Ray says of them.

    `answer`: a method that living ones answer at once. An actor that does not answer within
    NOTICE_S is not taken for dead.
    """
    dead: dict[str, str] = {}
    deadline = time.monotonic() + NOTICE_S
    unknown = dict(actors)
    while unknown and time.monotonic() < deadline and not ray_ended():
        calls = {name: start_call(actor, answer) for name, actor in unknown.items()}
        pending: list[Any] = list(calls.values())
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=LOOK_S)
        ended = set(ready)
        for name, call in calls.items():
            if call not in ended:
                continue
            try:
                ray.get(cast(Any, call))
            except ActorUnavailableError:
                time.sleep(SHORT_S)  # its connection broke, and Ray does not know yet why
                continue
            except RayError as error:
                dead[name] = str(error)
            del unknown[name]
    return dead


def _first_failure(
    phase: str, errors: dict[str, Exception], pending: Mapping[str, Any]
) -> WorkerFailure:
    """The failure that explains the others.

    A worker that raised by itself comes before one that only lost its peer.
    """
    ready: list[Any] = []
    if pending:
        calls = list(pending.values())
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=GRACE_S)
    for name, call in pending.items():
        if call in ready:
            try:
                ray.get(call)
            except RayError as other:
                errors[name] = other
    causes = [name for name, error in errors.items() if not _is_echo(error)]
    name = next(iter(causes or errors))
    error = errors[name]
    others = sorted(set(errors) - {name})
    echo = f"\n(also failed: {', '.join(others)})" if others else ""
    failure = WorkerFailure(f"{phase} failed on {name}:\n{_traceback(error)}{echo}")
    failure.lost_touch = _is_echo(error) or isinstance(error, ActorUnavailableError)
    return failure


def _is_echo(error: Exception) -> bool:
    """Whether a worker failed because another did: what gloo says of a peer that is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out")
    return any(sign in str(error) for sign in signs)


def _traceback(error: Exception) -> str:
    return str(error) if isinstance(error, RayTaskError) else f"the process died: {error}"
