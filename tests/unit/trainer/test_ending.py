"""How a run ended is in its folder, whatever ended it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.observability.outcome import RECORD_FILE, RunRecord, read_record, write_record
from rlhf3d.trainer.ending import recorded
from rlhf3d.trainer.preemption import Preempted, PreemptionHandler


@pytest.mark.parametrize(
    ("error", "signal", "end"),
    [
        (ValueError("no \x1b room\nat all"), None, "failed: ValueError: no room"),
        (SystemExit(3), None, "failed: SystemExit: 3"),
        (KeyboardInterrupt(), None, "stopped: interrupted"),
        (Preempted(), "SIGHUP", "stopped: SIGHUP came before the first step"),
        (RuntimeError("no answer"), "SIGTERM", "stopped: SIGTERM came"),
        (RuntimeError("no answer"), None, "failed: RuntimeError: no answer"),
    ],
)
def test_what_ends_a_run_is_recorded(
    tmp_path: Path, error: BaseException, signal: str | None, end: str
) -> None:
    preemption = PreemptionHandler(None, 0.0)
    preemption.signal = signal
    with pytest.raises(type(error)), recorded(tmp_path, 7, preemption):
        assert read_record(tmp_path) == RunRecord(7)
        raise error
    found = read_record(tmp_path)
    assert found is not None and str(found) == end and found.total_steps == 7


def test_what_comes_after_the_end_does_not_undo_it(tmp_path: Path) -> None:
    with pytest.raises(OSError), recorded(tmp_path, 7, PreemptionHandler(None, 0.0)):
        write_record(tmp_path, RunRecord(7, "finished"))
        raise OSError("the report")
    assert str(read_record(tmp_path)) == "finished"


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    for text in ("", "[]", "{}", "\xff"):
        (tmp_path / RECORD_FILE).write_text(text, encoding="latin-1")
        assert read_record(tmp_path) is None
