"""Waiting on other processes.

Invariant: every wait has a deadline; its error names the phase, who was waited for, and the first
failure's traceback.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

if TYPE_CHECKING:
    from rlhf3d.placement.calls import Reply, ReplyStream

R = TypeVar("R")

GRACE_S = 2.0
"""Seconds to wait for further failures after the first, one of which may be its cause."""
LOOK_S = 1.0
"""Seconds between two looks at whether Ray has ended."""
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


def gather(phase: str, calls: Mapping[str, Reply[R]], timeout_s: float) -> list[R]:
    """Return the results of the named calls in their order.

    Raises WorkerFailure at the first failure or at the deadline.
    """
    results = dict(_arrivals(phase, dict(calls), timeout_s))
    return [results[name] for name in calls]


def stream(
    phase: str, streams: Mapping[str, ReplyStream[R]], timeout_s: float
) -> Iterator[tuple[str, R]]:
    """Yield (name, item) of the named streams as items come. Raises WorkerFailure as `gather`."""
    return _arrivals(phase, dict(streams), timeout_s)


def _arrivals(phase: str, pending: dict[str, Any], timeout_s: float) -> Iterator[tuple[str, Any]]:
    """(name, result) of calls and streams, until all have ended."""
    deadline = time.monotonic() + timeout_s
    while pending:
        left_s = max(0.0, deadline - time.monotonic())
        # In turns of LOOK_S: ray.wait itself does not return when Ray has ended.
        ready, _ = ray.wait(list(pending.values()), num_returns=1, timeout=min(LOOK_S, left_s))
        if why := ray_ended():
            raise WorkerFailure(why)
        if not ready and left_s > LOOK_S:
            continue
        if not ready:
            late = WorkerFailure(
                f"{phase}: no answer within {timeout_s:.0f} s from {', '.join(pending)}; "
                "raise cluster.phase_timeout_s if the work is really that long, or look into logs/"
            )
            late.lost_touch = True
            raise late
        name = next(name for name, waited in pending.items() if waited is ready[0])
        source = pending[name]
        try:
            if isinstance(source, ray.ObjectRef):
                del pending[name]
                item = ray.get(source)
            else:
                # ray.wait said that there is an item, or that the stream has ended.
                item = ray.get(next(source))
        except StopIteration:
            del pending[name]
            continue
        except RayError as error:
            pending.pop(name, None)
            raise _first_failure(phase, {name: error}, pending) from None
        yield name, item


def _first_failure(
    phase: str,
    errors: dict[str, Exception],
    pending: Mapping[str, ray.ObjectRef | ray.ObjectRefGenerator],
) -> WorkerFailure:
    """The failure that explains the others.

    A worker that raised by itself comes before one that only lost its peer.
    """
    # A stream's next item may be a good one: only its end tells of a failure.
    ends = {
        name: waited if isinstance(waited, ray.ObjectRef) else waited.completed()
        for name, waited in pending.items()
    }
    ready: list[Any] = []
    if ends:
        ready, _ = ray.wait(list(ends.values()), num_returns=len(ends), timeout=GRACE_S)
    for name, end in ends.items():
        if end in ready:
            try:
                ray.get(end)
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
