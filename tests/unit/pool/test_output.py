"""What sessions print: shown up to a limit, whatever reads it."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.pool import output
from rlhf3d.pool.output import CUT, EACH_BYTES
from rlhf3d.pool.process import CallResult, Ending
from rlhf3d.pool.sessions import SessionPool


class Printer:
    """Prints as a payload says: (what, how often)."""

    def __call__(self, payload: Any) -> str:
        how, text, times = payload
        for _ in range(times):
            if how == "print":
                print(text)
            elif how == "descriptor":
                os.write(1, text.encode())
            else:
                subprocess.run(["echo", text], check=True)
        return "done"


@contextmanager
def standard_error(descriptor: int) -> Iterator[None]:
    """Have the pools that are made inside write to it."""
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def run(payloads: list[Any], into: Path, timeout_s: float = 60.0) -> tuple[list[CallResult], str]:
    """What became of calls, each in a session, and what they printed."""
    with into.open("wb") as file, standard_error(file.fileno()):
        pool = SessionPool(Printer, what="printers")
        sessions = [pool.session() for _ in payloads]
        calls = [
            one.call(payload, timeout_s) for one, payload in zip(sessions, payloads, strict=True)
        ]
        results = [call.result(60.0) for call in calls]
        pool.close()
    return results, into.read_text()


def test_each_process_prints_up_to_a_limit_and_one_that_never_stops_costs_nothing(
    tmp_path: Path,
) -> None:
    payloads = [
        ("print", "a" * 63, 10_000_000),
        ("descriptor", "b" * 63 + "\n", 10_000),
        ("child", "c" * 63, 3),
        ("print", "d" * 63, 1000),
    ]
    (endless, *others), text = run(payloads, tmp_path / "stderr", timeout_s=5.0)
    assert endless.ending is Ending.TIMEOUT
    assert [result.value for result in others] == ["done"] * 3
    lines = text.splitlines()
    counts = {letter: lines.count(letter * 63) for letter in "abcd"}
    # One line may be cut in its middle, or stand behind a part of another process's.
    for letter in "ab":
        assert EACH_BYTES // 64 - 8 <= counts[letter] <= EACH_BYTES // 64
    assert counts["c"] >= 1 and counts["d"] >= 1000 - 8
    assert text.count(CUT.strip()) == 2
    assert len(text) == 2 * EACH_BYTES + 1003 * 64 + 2 * len(CUT)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_printed_last_is_there_in_lines_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    results, text = run([("print", f"<{n}>", 2000) for n in range(20)], tmp_path / "stderr")
    assert [result.value for result in results] == ["done"] * 20
    assert sorted(text.splitlines()) == sorted([f"<{n}>" for n in range(20)] * 2000)


def test_all_processes_together_print_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "ALL_BYTES", 1000)
    file = (tmp_path / "stderr").open("wb+")
    poll = select.poll()
    with file, standard_error(file.fileno()):
        outputs = output.Outputs(poll)
        for number in range(4):
            end = outputs.begin(number)
            os.write(end, b"x" * 400)
            os.close(end)
            for ready, _ in poll.poll(0):
                outputs.pass_on(ready)
            outputs.finish(number)
        assert poll.poll(0) == []
    assert (tmp_path / "stderr").read_text() == "x" * 1000 + CUT


def test_nobody_waits_for_a_standard_error_that_takes_nothing() -> None:
    end, full = os.pipe()
    began = time.monotonic()
    with standard_error(full):
        pool = SessionPool(Printer, what="printers")
        sessions = [pool.session() for _ in range(8)]
        calls = [one.call(("print", "x" * 999, 1000), 60.0) for one in sessions]
        assert [call.result(60.0).value for call in calls] == ["done"] * 8
        pool.close()
    assert time.monotonic() - began < 30
    os.close(end)
    os.close(full)


def test_a_pipe_is_not_taken_for_a_former_one_of_its_number(tmp_path: Path) -> None:
    """Where a process has closed what it prints into, and ends after another one has begun."""
    poll = select.poll()
    with (tmp_path / "stderr").open("wb") as file, standard_error(file.fileno()):
        outputs = output.Outputs(poll)
        os.close(outputs.begin(1))
        ((former, _),) = poll.poll(0)
        outputs.pass_on(former)
        end = outputs.begin(2)
        outputs.finish(1)
        os.write(end, b"still here")
        os.close(end)
        outputs.finish(2)
    assert (tmp_path / "stderr").read_text() == "still here"
