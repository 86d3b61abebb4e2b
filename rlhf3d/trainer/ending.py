"""How a run ends, written to its folder for those who look at it.

Invariant: whatever ends the run but a kill is in its record, and writing it hides no error.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf3d.observability.outcome import RunRecord, read_record, write_record
from rlhf3d.observability.samples import printable
from rlhf3d.trainer.preemption import Preempted, PreemptionHandler

_LONGEST = 300
"""Characters of an error's first line."""


@contextmanager
def recorded(run: Path, total_steps: int, preemption: PreemptionHandler) -> Iterator[None]:
    """Record that the run has begun and, where the body raises, how that ended it."""
    write_record(run, RunRecord(total_steps))
    try:
        yield
    except BaseException as error:
        # One that comes after the end, in the report, does not undo it.
        known = read_record(run)
        if known is None or known.end is None:
            with suppress(OSError):  # the error itself may be that the disk is full
                write_record(run, _ended_by(error, total_steps, preemption.signal))
        raise


def _ended_by(error: BaseException, total_steps: int, signal: str | None) -> RunRecord:
    if isinstance(error, Preempted):
        return RunRecord(total_steps, "stopped", f"{signal} came before the first step")
    if isinstance(error, KeyboardInterrupt):
        return RunRecord(total_steps, "stopped", "interrupted")
    if signal is not None and isinstance(error, RuntimeError):
        # It ended others too: what failed is what the run was waiting for.
        return RunRecord(total_steps, "stopped", f"{signal} came")
    first_line = str(error).partition("\n")[0]
    why = f"{type(error).__name__}: {printable(first_line, _LONGEST)}"
    return RunRecord(total_steps, "failed", why)
