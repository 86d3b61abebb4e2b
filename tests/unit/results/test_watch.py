"""`rlhf3d watch`: the command until Ctrl-C, and its page in headless Chromium."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from support.browser import needs_chromium, page_after
from support.page_runs import healthy_rows, sample, trajectory, write_rows

from rlhf3d.observability.page.serve import PageServer, Served
from rlhf3d.observability.samples import write_samples
from rlhf3d.observability.tokens import write_tokens
from rlhf3d.results import live_page
from rlhf3d.results.live_page import EVERY_S, LivePage


def append(run: Path, step: int) -> None:
    """A further step, as a run writes it: its row comes last."""
    write_samples(run, step, [sample("p", f"answer of step {step}", 1.0), sample("p", "b", 0.0)])
    write_tokens(run, step, [trajectory(0, 0.9)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(healthy_rows(step)[-1]) + "\n")


@contextmanager
def served(server: PageServer) -> Iterator[None]:
    """Until the body ends."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield
    server.shutdown()
    thread.join(10)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


def test_the_command_until_ctrl_c(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", healthy_rows(4))
    command = [sys.executable, "-m", "rlhf3d.cli", "watch", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        assert "Steps 1 to 4" in get(url)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait(20)


def test_a_run_is_served_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_page, "EVERY_S", 0.0)
    run = tmp_path / "run"
    with PageServer(0, LivePage([run]).current) as server, served(server):
        versions = [json.loads(get(f"{server.url}version"))["version"]]
        assert "Nothing to draw yet" in get(server.url)
        run.mkdir()
        for step in (1, 2, 3):
            append(run, step)
            deadline = time.monotonic() + 20
            while (version := json.loads(get(f"{server.url}version"))["version"]) == versions[-1]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            versions.append(version)
            page = get(server.url)
            assert f"Steps 1 to {step}" in page and f"answer of step {step}" in page
            assert f'data-version="{version}"' in page
    assert len(set(versions)) == 4


class Growing:
    """A run that has written one more step when a browser asks for the third time."""

    def __init__(self, run: Path) -> None:
        self.run, self.asked = run, 0
        # Each look is due: the browser's own time does not run as ours does.
        self.page = LivePage([run], lambda: self.asked * EVERY_S)

    def current(self) -> Served:
        self.asked += 1
        if self.asked == 3:
            append(self.run, 41)
        found = self.page.current()
        if self.asked > 1:
            return found
        # As if the reader had opened and chosen.
        html = found.html.replace("<details ", "<details open ")
        html = html.replace('<option value="logprob">', '<option value="logprob" selected>')
        return replace(found, html=html)


@needs_chromium
def test_the_page_renews_itself_and_stays_as_the_reader_left_it(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", healthy_rows(39))
    append(run, 40)
    growing = Growing(run)
    with PageServer(0, growing.current) as server, served(server):
        page = page_after(server.url, tmp_path / "profile", 8000)
    assert "Steps 1 to 41" in page and "answer of step 41" in page
    assert f'data-version="{growing.page.current().version}"' in page
    assert "run: step 41 ended" in page and "hold the page" in page
    charts = re.findall(r'<figure class="chart', page)
    # One is hidden, and empty: no step was profiled.
    assert len(charts) > 15 and page.count("<canvas") == len(charts) - 1
    # What the reader had chosen, which a page does not begin with.
    assert re.search(r"<details[^>]* open", page) and "that the engine gave the token" in page
