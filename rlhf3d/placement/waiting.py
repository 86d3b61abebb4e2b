"""Waiting on other processes.

Invariant: every wait has a deadline; its error names the phase, who was waited for, and the first failure's traceback.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

GRACE_S = 2.0


class WorkerFailure(RuntimeError):
    """A worker raised, died or did not answer in time."""


def gather(phase: str, calls: dict[str, ray.ObjectRef], timeout_s: float) -> list[Any]:
    """Results of the named calls in their order. Raises WorkerFailure at the first failure or at the deadline."""
    pending = {ref: name for name, ref in calls.items()}
    results: dict[str, Any] = {}
    deadline = time.monotonic() + timeout_s
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerFailure(
                f"{phase}: no answer within {timeout_s:.0f} s from {', '.join(pending.values())}; "
                "raise cluster.phase_timeout_s if the work is really that long, or look into logs/"
            )
        name = pending.pop(ready[0])
        try:
            results[name] = ray.get(ready[0])
        except RayError as error:
            raise _first_failure(phase, {name: error}, pending) from None
    return [results[name] for name in calls]


def _first_failure(phase: str, errors: dict[str, Exception], pending: dict[ray.ObjectRef, str]) -> WorkerFailure:
    """The failure that explains the others: a worker that raised by itself before one that lost its peer."""
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=GRACE_S) if pending else ([], [])
    for ref in ready:
        try:
            ray.get(ref)
        except RayError as other:
            errors[pending[ref]] = other
    name, error = min(errors.items(), key=lambda item: _is_echo(item[1]))
    others = sorted(set(errors) - {name})
    echo = f"\n(also failed: {', '.join(others)})" if others else ""
    return WorkerFailure(f"{phase} failed on {name}:\n{_traceback(error)}{echo}")


def _is_echo(error: Exception) -> bool:
    text = str(error)
    return any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Timed out"))


def _traceback(error: Exception) -> str:
    return str(error) if isinstance(error, RayTaskError) else f"the process died: {error}"
