"""The page of a run that goes on: when it is made again, and what it says of the run."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from support.page_runs import healthy_rows, write_rows

from rlhf3d.observability.outcome import RunRecord, write_record
from rlhf3d.results import live_page
from rlhf3d.results.live_page import EVERY_S, LivePage, Progress


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def append(run: Path, step: int) -> None:
    """A further row, as the writer writes it."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(healthy_rows(step)[-1]) + "\n")


def told(page: Any, what: str) -> bool:
    """Whether that is all it says, some seconds ago."""
    (line,) = page.status
    return re.fullmatch(rf"{re.escape(what)} \d+ s ago\.", line) is not None


def test_from_nothing_to_a_page(tmp_path: Path) -> None:
    run, clock = tmp_path / "run", Clock()
    page = LivePage([run], clock)
    first = page.current()
    assert "waits for the folder" in first.status[0] and "Nothing to draw yet" in first.html
    run.mkdir()
    (run / "metrics.jsonl").touch()
    clock.now += EVERY_S
    assert "waits for the first row" in page.current().status[0]
    append(run, 1)
    assert page.current().version == first.version  # looked at only now and then
    clock.now += EVERY_S
    second = page.current()
    assert second.version != first.version and "Steps 1 to 1" in second.html
    assert f'data-version="{second.version}"' in second.html
    assert told(second, "run: step 1 ended")
    # Half a row is no row.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    clock.now += EVERY_S
    assert "Steps 1 to 1" in page.current().html


def test_made_once_for_all_and_only_when_rows_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock, made = write_rows(tmp_path / "run", healthy_rows(3)), Clock(), []

    def slow(found: object) -> list[object]:
        made.append(found)
        time.sleep(0.05)
        return []

    monkeypatch.setattr(live_page, "view_all", slow)
    page = LivePage([run], clock)
    readers = [Thread(target=page.current) for _ in range(20)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(10)
    assert len(made) == 1
    clock.now += 10 * EVERY_S
    page.current()
    assert len(made) == 1  # nothing was written
    append(run, 4)
    clock.now += EVERY_S
    page.current()
    append(run, 5)
    page.current()
    assert len(made) == 2  # at most once in EVERY_S
    clock.now += EVERY_S
    page.current()
    assert len(made) == 3


def test_a_page_that_takes_long_is_made_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock, made = write_rows(tmp_path / "run", healthy_rows(3)), Clock(), []

    def slow(found: object) -> list[object]:
        made.append(found)
        clock.now += 5.0
        return []

    monkeypatch.setattr(live_page, "view_all", slow)
    page = LivePage([run], clock)
    page.current()
    append(run, 4)
    clock.now += 19.0
    page.current()
    assert len(made) == 1
    clock.now += 1.0
    page.current()
    assert len(made) == 2


def test_what_is_wrong_is_said_above_the_last_good_page(tmp_path: Path) -> None:
    run, clock = write_rows(tmp_path / "run", healthy_rows(3)), Clock()
    page = LivePage([run], clock)
    good = page.current()
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + "broken\n")
    clock.now += EVERY_S
    bad = page.current()
    assert (bad.html, bad.version) == (good.html, good.version)
    assert "not up to date" in bad.status[0] and "line 4" in bad.status[0]
    path.write_text(path.read_text().replace("broken\n", ""))
    append(run, 4)
    clock.now += EVERY_S
    assert "Steps 1 to 4" in page.current().html and len(page.current().status) == 1
    # From the start there is no good one.
    path.write_text("broken\n{}\n")
    assert "line 1" in LivePage([run]).current().html


def test_several_runs_of_which_one_waits(tmp_path: Path) -> None:
    runs, clock = [tmp_path / "one", tmp_path / "<b>two"], Clock()
    write_rows(runs[0], healthy_rows(3))
    page = LivePage(runs, clock)
    found = page.current()
    assert "<h1>one</h1>" in found.html and "waits" in found.status[1]
    assert "Steps 1 to 3" in found.html
    write_rows(runs[1], healthy_rows(2))
    clock.now += EVERY_S
    found = page.current()
    assert "<h1>2 runs</h1>" in found.html and "<b>two" not in found.html
    assert [line.partition(":")[0] for line in found.status] == ["one", "<b>two"]


def test_the_waiting_page_escapes(tmp_path: Path) -> None:
    found = LivePage([tmp_path / "<script>x"]).current()
    assert "<script>x" not in found.html and "&lt;script&gt;x" in found.html


@pytest.mark.parametrize(
    ("total", "age_s", "line"),
    [
        (80, 5.0, "r: step 60 of 80 ended 5 s ago."),
        (None, 119.0, "r: step 60 ended 119 s ago."),
        (None, 121.0, "r: step 60 ended 2 min ago, and the last steps took up to 40 s."),
        (80, 9000.0, "r: step 60 of 80 ended 2 h ago, and the last steps took up to 40 s."),
    ],
)
def test_how_a_run_stands(total: int | None, age_s: float, line: str) -> None:
    record = None if total is None else RunRecord(total)
    progress = Progress("r", 60, 40.0)
    alive, gone = (
        progress.line(record, age_s, lambda alive=alive: alive) for alive in (True, False)
    )
    assert alive.startswith(line) and gone.startswith(line)
    late = "took up to" in line
    assert ("is alive" in alive, "It ended, or" in gone) == (late, late)


def test_the_end_of_a_run_is_told(tmp_path: Path) -> None:
    run, clock = tmp_path / "run", Clock()
    write_rows(run, healthy_rows(3))
    write_record(run, RunRecord(8))
    page = LivePage([run], clock)
    assert told(page.current(), "run: step 3 of 8 ended")
    write_record(run, RunRecord(8, "stopped", "SIGTERM was received"))
    clock.now += EVERY_S
    found = page.current()
    assert found.status == ["run: stopped: SIGTERM was received, after step 3 of 8."]
    assert "; stopped: SIGTERM was received." in found.html
    # It goes on.
    write_record(run, RunRecord(8))
    append(run, 4)
    clock.now += EVERY_S
    assert told(page.current(), "run: step 4 of 8 ended")
    (run / "metrics.jsonl").write_text("")
    write_record(run, RunRecord(8, "failed", "ValueError: no"))
    status = LivePage([run]).current().status
    assert status == [f"{run}: failed: ValueError: no, before the first step."]


def test_a_run_without_a_process_is_told_from_one_in_a_long_step(tmp_path: Path) -> None:
    run, clock = write_rows(tmp_path / "run", healthy_rows(3)), Clock()
    hour_ago = time.time() - 3600
    os.utime(run / "metrics.jsonl", (hour_ago, hour_ago))
    page = LivePage([run], clock)
    assert "It ended, or" in page.current().status[0]
    with (run / "metrics.jsonl").open("a"):
        clock.now += EVERY_S
        assert "is alive" in page.current().status[0]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="not the folder of a run"):
            LivePage([path])
