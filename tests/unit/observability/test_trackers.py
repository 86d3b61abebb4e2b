"""Trackers get what a run writes, and nothing that they do stops or delays it.

Those of a library that is not installed are skipped: `pip install 'rlhf3d[wandb]'` and so on.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf3d.observability.metrics import MetricsWriter, read_metrics
from rlhf3d.observability.samples import Kind, Sample, read_samples, samples_path
from rlhf3d.observability.trackers import follow
from rlhf3d.observability.trackers.follow import Trackers
from rlhf3d.observability.trackers.protocol import COLUMNS, RunFacts
from rlhf3d.observability.trackers.registry import TRACKERS, missing_libraries, open_trackers

SAMPLE = Sample("2+2?", "a | b\nc", "4", 1.0, "scored", 1, "stop", 3, answer="04")
BLOCK = 32 << 10


class Follower:
    """A tracker that notes its calls, and fails from a step on."""

    def __init__(self, fails_from: int = 99) -> None:
        self.fails_from = fails_from
        self.calls: list[object] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))
        if step >= self.fails_from:
            raise OSError(28, "No space left on device")

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        self.calls.append((step, kind, list(rows)))

    def close(self) -> None:
        self.calls.append("close")


def write(
    folder: Path, trackers: Trackers, steps: Sequence[int], resume: int | None = None
) -> None:
    """A run of these steps; the loss of step N is N / 4."""
    with MetricsWriter(folder, resume_step=resume, trackers=trackers) as writer:
        for step in steps:
            writer.write(step, {"actor/loss": step / 4, "odd": math.nan})
            writer.samples(step, [SAMPLE] * 3)


def run(
    folder: Path, names: Sequence[str], steps: Sequence[int], resume: int | None = None
) -> None:
    """The same with trackers of libraries, which must not complain."""
    facts = RunFacts(
        folder, "project", "name", {"actor.lr": 1e-6, "a.none": None}, {"torch": "2"}, resume
    )
    complaints: list[str] = []
    write(folder, open_trackers(names, facts, 2, complaints.append), steps, resume)
    assert complaints == []


def plugged(makers: Mapping[str, Callable[[], Any]], rows: int = 2) -> tuple[Trackers, list[str]]:
    warnings: list[str] = []
    return Trackers(makers, rows, warnings.append), warnings


def test_trackers_see_what_is_written(tmp_path: Path) -> None:
    one, other = Follower(), Follower()
    trackers, warnings = plugged({"one": lambda: one, "other": lambda: other})
    with MetricsWriter(tmp_path, trackers=trackers) as writer:
        writer.write(1, {"loss": math.inf})
        writer.samples(1, [SAMPLE] * 3, "greedy")
    assert one.calls == [(1, {"loss": math.inf}), (1, "greedy", [SAMPLE] * 2), "close"]
    assert other.calls == one.calls and warnings == []
    assert read_samples(samples_path(tmp_path, 1, "greedy")) == [SAMPLE] * 3


def test_a_tracker_that_fails_is_reported_once_and_counted(tmp_path: Path) -> None:
    full, well = Follower(fails_from=2), Follower()
    trackers, warnings = plugged({"full": lambda: full, "well": lambda: well}, rows=0)
    write(tmp_path, trackers, (1, 2, 3), None)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert len(full.calls) == len(well.calls) == 4
    first, last = warnings
    assert first.startswith("full failed (OSError: [Errno 28] No space left on device)")
    assert last.startswith("full did not take 2 of 3 records")


def test_a_tracker_that_does_not_open_takes_nothing(tmp_path: Path) -> None:
    def refuse() -> Follower:
        raise PermissionError("no key")

    trackers, warnings = plugged({"shut": refuse}, rows=0)
    write(tmp_path, trackers, (1, 2), None)
    assert "PermissionError: no key" in warnings[0] and "2 of 2" in warnings[1]


def test_a_failure_is_shown_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> Follower:
        raise ValueError("no server\n" + "again\n" * 100 + "the end")

    trackers, warnings = plugged({"shut": refuse}, rows=0)
    write(tmp_path, trackers, (1,), None)
    assert all("\n" not in text and len(text) < 450 for text in warnings)
    assert "no server again" in warnings[0] and "…" in warnings[0]
    assert "the end" in caplog.text


def test_a_tracker_that_hangs_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "OPEN_S", 0.05)
    monkeypatch.setattr(follow, "CLOSE_S", 0.05)
    monkeypatch.setattr(follow, "WAITING_CALLS", 3)
    release, stuck = threading.Event(), Follower()

    def hang() -> Follower:
        release.wait()
        return stuck

    trackers, warnings = plugged({"stuck": hang}, rows=0)
    write(tmp_path, trackers, range(1, 6), None)
    release.set()
    assert len(read_metrics(tmp_path)) == 5
    assert warnings[0].startswith("stuck is not open after 0.05 s")
    assert warnings[1].startswith("stuck failed (3 calls are waiting)")
    assert len(warnings) == 3 and "5 of 5" in warnings[2]


def test_trackers_are_open_before_a_run_starts_its_processes() -> None:
    made: list[Follower] = []

    def slow() -> Follower:
        time.sleep(0.2)
        made.append(Follower())
        return made[0]

    plugged({"slow": slow}, rows=0)
    assert made


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a folder with runs of wandb, which is no library.
    (tmp_path / "absent_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"pip install 'rlhf3d\[absent_tracker\]'"):
        open_trackers(["tensorboard", "absent_tracker"], RunFacts(tmp_path), 0, print)
    assert list(missing_libraries(["tensorboard"])) == []


def test_a_run_keeps_its_name_in_a_tracker_only_over_resumes(tmp_path: Path) -> None:
    RunFacts(tmp_path).keep_id("wandb", "abc")
    assert RunFacts(tmp_path, resume_step=2).known_id("wandb") == "abc"
    assert RunFacts(tmp_path).known_id("wandb") is None
    assert RunFacts(tmp_path, resume_step=2).known_id("mlflow") is None


def test_tensorboard_has_the_same_curve_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path, ["tensorboard"], (1, 2, 3))
    # Files are read by the second in their names, then by a counter, as text: 10 before 9.
    (written,) = (tmp_path / "tensorboard").iterdir()
    written.rename(written.with_name("events.out.tfevents.1.of-an-earlier-second"))
    run(tmp_path, ["tensorboard"], (3, 4), resume=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("actor/loss")]
    assert values == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    texts = {
        tag: events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for tag in ("config", "versions", "samples/train")
    }
    assert "| actor.lr | 1e-06 |" in texts["config"] and "| torch | 2 |" in texts["versions"]
    lines = texts["samples/train"].splitlines()
    # A heading, its rule, and two completions, each in one line.
    assert lines[0] == f"| {' | '.join(COLUMNS)} |" and len(lines) == 4
    assert lines[2] == "| 4 | 2+2? | a \\| b<br>c | 04 | 4 | 1.0 | scored | 1 | 3 |"


def needs(library: str) -> pytest.MarkDecorator:
    absent = find_spec(library) is None
    return pytest.mark.skipif(absent, reason=f"{library} is not installed: rlhf3d[{library}]")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder of the test's, and nothing that names a server."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "SWANLAB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    # Trackio reads it once, when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def wandb_records(folder: Path) -> list[Any]:
    """What an offline folder of wandb holds, in order, once it is complete."""
    (file,) = folder.glob("*.wandb")
    until = time.monotonic() + 20
    while True:
        records = read_wandb(file)
        # The process of wandb may write the last of them after `finish` has returned.
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < until, f"{file} has no end"
        time.sleep(0.05)


def read_wandb(file: Path) -> list[Any]:
    """The records of a file of wandb, as far as they are written."""
    from wandb.proto import wandb_internal_pb2

    data, place, records, parts = file.read_bytes(), 7, [], b""
    # The log format of LevelDB after seven bytes: checksum, length and type in front of each part,
    # none of which crosses a block.
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete, or its last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@needs("wandb")
def test_wandb_continues_a_run_offline(offline: Path) -> None:
    run(offline, ["wandb", "tensorboard"], (1, 2))
    run(offline, ["wandb", "tensorboard"], (3,), resume=2)
    folders = sorted((offline / "trackers/wandb").glob("offline-run-*"))
    seen, names = {}, set()
    for folder in folders:
        for record in wandb_records(folder):
            if record.HasField("run"):
                names.add((record.run.run_id, record.run.project, record.run.display_name))
                config = {item.key: item.value_json for item in record.run.config.update}
                assert json.loads(config["actor.lr"]) == 1e-6
                assert json.loads(config["versions"]) == {"torch": "2"}
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): item.value_json
                    for item in record.history.item
                }
                seen[record.history.step.num] = row
    name = (offline / "trackers/wandb.id").read_text().strip()
    assert len(folders) == 2 and names == {(name, "project", "name")}
    assert {step: float(row["actor/loss"]) for step, row in seen.items()} == {
        1: 0.25,
        2: 0.5,
        3: 0.75,
    }
    table = {key: json.loads(value) for key, value in seen[3].items() if key.startswith("samples/")}
    assert table["samples/train/_type"] == "table-file" and table["samples/train/nrows"] == 2


@needs("mlflow")
def test_mlflow_continues_a_run_in_its_local_store(offline: Path) -> None:
    from mlflow import MlflowClient

    run(offline, ["mlflow", "tensorboard"], (1, 2))
    run(offline, ["mlflow", "tensorboard"], (3,), resume=2)
    client = MlflowClient(f"sqlite:///{offline / 'trackers/mlflow/mlflow.db'}")
    experiment = client.get_experiment_by_name("project")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (offline / "trackers/mlflow.id").read_text().strip()
    assert (found.info.run_name, found.info.status) == ("name", "FINISHED")
    assert found.data.params == {"actor.lr": "1e-06", "a.none": "None"}
    assert found.data.tags["version.torch"] == "2"
    curve = client.get_metric_history(found.info.run_id, "actor/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    table = offline / "trackers/mlflow/artifacts" / found.info.run_id
    table = json.loads((table / "artifacts/samples/train/step_3.json").read_text())
    assert table["columns"] == list(COLUMNS) and len(table["data"]) == 2


@needs("swanlab")
def test_swanlab_continues_a_run_offline(offline: Path) -> None:
    run(offline, ["swanlab", "tensorboard"], (1, 2))
    run(offline, ["swanlab", "tensorboard"], (3,), resume=2)
    name = (offline / "trackers/swanlab.id").read_text().strip()
    folders = sorted((offline / "trackers/swanlab").glob(f"run-*-{name}"))
    # Each start has a folder of the same run, which `swanlab sync` puts together.
    assert len(folders) == len(list((offline / "trackers/swanlab").glob("run-*"))) == 2
    for folder, steps in zip(folders, (2, 1), strict=True):
        data = (folder / f"run-{name}.swanlab").read_bytes()
        assert data.count(b"actor/loss") >= steps
        assert "actor.lr" in (folder / "files/config.yaml").read_text()
        tables = list((folder / "media").rglob("*.json"))
        assert len(tables) == steps and "2+2?" in tables[0].read_text()


@needs("trackio")
def test_trackio_continues_a_run_in_its_local_store(offline: Path) -> None:
    run(offline, ["trackio", "tensorboard"], (1, 2))
    run(offline, ["trackio", "tensorboard"], (3,), resume=2)
    from trackio.sqlite_storage import SQLiteStorage

    name = (offline / "trackers/trackio.id").read_text().strip()
    assert SQLiteStorage.get_runs("project") == [name] and name.startswith("name-")
    logs = SQLiteStorage.get_logs("project", name)
    curve = {row["step"]: row["actor/loss"] for row in logs if "actor/loss" in row}
    assert curve == {1: 0.25, 2: 0.5, 3: 0.75}
    tables = [row["samples/train"] for row in logs if "samples/train" in row]
    assert len(tables) == 3 and len(tables[0]["_value"]) == 2
    assert SQLiteStorage.get_run_config("project", name)["actor.lr"] == 1e-6


def test_every_name_has_its_module() -> None:
    folder = Path(follow.__file__).parent
    assert [name for name in TRACKERS if not (folder / f"{name}.py").is_file()] == []
