"""The live view in a pseudo-terminal: a tiny run with no models, and what is on the screen."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf3d.observability.console import Console
from rlhf3d.processes import STOP_SIGNALS

RUN = """
import os, subprocess, sys, time
from rlhf3d.observability.console import Console
from rlhf3d.observability.live import screen

screen.REFRESH_S = 0.1

def run(end):
    with Console() as console:
        console.header(["model tiny"], total_steps=2)
        with console.phase("generate"):
            time.sleep(0.7)
            print("printed", flush=True)
            os.write(2, b"written by a library\\n")
            subprocess.run(["echo", "from a process"])
            os.write(1, b"without an end")
            time.sleep(2.0)
        console.note("something")
        console.step({"timing_s/step": 1.0, "critic/score/mean": 0.5}, 1, 2)
        with console.phase("update_actor"):
            time.sleep(0.7)
            if end == "error":
                raise RuntimeError("what went wrong")
            if end == "signal":
                os.write(2, b"waits\\n")
                time.sleep(60)
        console.done(["saved"])

run(sys.argv[1])
"""


def run_in_terminal(
    end: str, columns: int, seen: Callable[[str, subprocess.Popen[bytes]], None] = lambda *_: None
) -> str:
    """What the run writes to a terminal; `seen` is called with what came so far."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
    command = [sys.executable, "-X", "utf8", "-c", RUN, end]
    with subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=variables | {"TERM": "xterm-256color"},
    ) as process:
        os.close(terminal)
        output = b""
        while True:
            try:
                output += os.read(master, 65536)
            except OSError:  # the last one who had it open has ended
                break
            seen(output.decode(errors="replace"), process)
    os.close(master)
    return output.decode()


def screen(output: str) -> list[str]:
    """The lines down to the cursor, after what a terminal does with the codes that rich writes."""
    lines, row, column = [""], 0, 0
    for code in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", output):
        if code == "\r":
            column = 0
        elif code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code == "\x1b[1A":
            row -= 1
        elif code == "\x1b[2K":
            lines[row] = ""
        elif not code.startswith("\x1b"):
            lines[row] = f"{lines[row][:column]:<{column}}{code}{lines[row][column + len(code) :]}"
            column += len(code)
        else:
            assert code.endswith("m"), f"an unknown code {code!r}"
    assert not any(lines[row + 1 :]), "below the cursor"
    return [line.rstrip() for line in lines[: row + 1]]


@pytest.mark.parametrize("columns", [60, 140])
def test_the_view_appears_and_goes(columns: int) -> None:
    output = run_in_terminal("done", columns)
    assert "step 1/2 │ generate 0:0" in re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert screen(output) == [
        "model tiny",
        "printed",
        "written by a library",
        "from a process",
        "without an end",
        "note: something",
        "step 1/2 │ reward 0.500 │ 1 s, eta 0:01",
        "saved",
        "",
    ]


def test_an_error_leaves_the_terminal_clean() -> None:
    lines = screen(run_in_terminal("error", 80))
    assert lines[6:8] == [
        "step 1/2 │ reward 0.500 │ 1 s, eta 0:01",
        "Traceback (most recent call last):",
    ]
    assert lines[-2:] == ["RuntimeError: what went wrong", ""]


def test_ctrl_c_leaves_the_terminal_clean() -> None:
    sent: list[float] = []

    def interrupt(output: str, process: subprocess.Popen[bytes]) -> None:
        if "waits" in output and not sent:
            sent.append(time.monotonic())
            process.send_signal(signal.SIGINT)

    lines = screen(run_in_terminal("signal", 80, interrupt))
    assert time.monotonic() - sent[0] < 20
    assert lines[7] == "waits"
    assert lines[-2:] == ["KeyboardInterrupt", ""]
    assert not any("━" in line for line in lines)


def test_signals_are_left_to_the_runs_own_thread() -> None:
    """While it blocks them, to start Ray, they must wait for it."""
    before = set(threading.enumerate())
    with Console(io.StringIO(), interactive=True) as console:
        console.header([])
        (drawing,) = set(threading.enumerate()) - before
        status = Path(f"/proc/self/task/{drawing.native_id}/status").read_text()
    (blocked,) = re.findall(r"SigBlk:\s*(\w+)", status)
    assert all(int(blocked, 16) >> (number - 1) & 1 for number in STOP_SIGNALS)
