"""Killed in a save, or out of room, a run finds a complete checkpoint: the old or the new one.

The ranks are stand-ins that write files; what real ranks write is tested in tests/integration.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.tiny_models import make_tiny_model

from rlhf3d.checkpoints import manifest as manifests
from rlhf3d.checkpoints import store
from rlhf3d.checkpoints.manifest import file_info, problems, read_manifest
from rlhf3d.checkpoints.resume import newest_complete
from rlhf3d.checkpoints.store import Store
from rlhf3d.config.schema import Config, ModelConfig, TrainerConfig
from rlhf3d.disk import NewFile
from rlhf3d.models.hf_io import write_model
from rlhf3d.models.spec import load_spec
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.trainer import checkpointing
from rlhf3d.trainer.checkpointing import CheckpointWriter, checkpoint_bytes

STAGES = (
    "begun",
    "exported",
    "half of the actor",
    "actor written",
    "critic written",
    "written",
    "complete",
    "renamed",
    "latest",
    "removing",
)
NEW_IS_THERE = STAGES[STAGES.index("renamed") :]


class FakeGroup:
    """Two ranks that write a file each for every model."""

    def __init__(self, size: int = 2000) -> None:
        self.size, self.folders, self.done = size, [], True

    def call_all(self, phase: str, method: Any, *args: Any) -> list[Any]:
        assert phase == "save_checkpoint"
        if method is TrainWorker.written:
            return [True, self.done]
        if method is TrainWorker.start_save:
            self.folders.append(Path(args[1]))
            for rank in range(2):
                (Path(args[1]) / f"__{rank}_0.distcp").write_bytes(os.urandom(self.size))
                store.reached(f"half of the {args[0]}")
            return [None, None]
        assert method is TrainWorker.finish_save
        folder = self.folders.pop(0)
        files = [f"__{rank}_0.distcp" for rank in range(2)]
        return [{name: tuple(file_info(folder / name))} for name in files]


class FakeExport:
    """One tensor."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def check(self) -> None:
        """It can be made."""

    def write(self, folder: Path, policy_version: int) -> list[NewFile]:
        forms = {"w": ((4,), torch.float32)}
        folder.mkdir()
        return write_model(folder, forms, [("w", torch.ones(4))], self.model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32, ffn=32)


def make_writer(model: Path, output: Path, group: Any = None, **trainer: Any) -> CheckpointWriter:
    config = Config(
        model=ModelConfig(str(model), dtype="float32"),
        trainer=TrainerConfig(output_dir=str(output), **trainer),
    )
    group = group or FakeGroup()
    models: Any = {"actor": group, "critic": group}
    return CheckpointWriter(config, load_spec(model), models, FakeExport(model))  # type: ignore[arg-type]


def save(made: CheckpointWriter, step: int, **metric: float) -> dict[str, float]:
    return made.save(step, 4, lambda: {"loader": step}, metric, last=True, wait=False)


def killed_at(stage: str, run: Callable[[], object]) -> int:
    """Run in a forked child that kills itself where the save reaches a stage; how it ended."""
    pid = os.fork()
    if pid == 0:
        try:

            def reached(now: str) -> None:
                if now == stage:
                    os.kill(os.getpid(), signal.SIGKILL)

            store.reached = checkpointing.reached = reached  # type: ignore[assignment]
            run()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("waits", [True, False], ids=["waited for", "in the background"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_leaves_a_whole_checkpoint(
    stage: str, waits: bool, model: Path, tmp_path: Path
) -> None:
    made = make_writer(model, tmp_path, keep_last=1, async_save=not waits)
    save(made, 2)
    made.finish()

    def to_the_next_boundary() -> None:
        save(made, 4)
        made.poll()

    assert killed_at(stage, to_the_next_boundary) == signal.SIGKILL
    kept = Store(tmp_path / "checkpoints")
    found, notes = newest_complete(kept)
    assert found is not None and notes == []
    assert (
        found.manifest.step == (4 if stage in NEW_IS_THERE else 2)
        and found.state["loader"] == found.manifest.step
    )
    left = kept.clean()
    assert left == {"latest": [], "renamed": [], "removing": ["step_2.deleted"]}.get(
        stage, ["step_4.partial"]
    )
    names = {path.name for path in kept.folder.iterdir()}
    assert names <= {"latest", "step_2", "step_4"} and f"step_{found.manifest.step}" in names
    again = make_writer(
        model, tmp_path, keep_last=1
    )  # and the next save of the same step goes through
    save(again, 4)
    assert kept.steps() == [4] and (kept.folder / "latest").read_text() == "step_4"


def test_writes_what_a_manifest_says(model: Path, tmp_path: Path) -> None:
    made = make_writer(model, tmp_path)

    def more(checkpoint: Path) -> None:
        (checkpoint / "experience").mkdir()
        (checkpoint / "experience" / "queue.json").write_text("{}")

    with mock.patch.object(manifests, "file_info", wraps=file_info) as read:
        metrics = made.save(
            3, 4, lambda: {"loader": 3}, {"acc": 0.5}, last=True, wait=False, more=more
        )
    folder = tmp_path / "checkpoints" / "step_3"
    manifest = read_manifest(folder)
    assert made.last == folder and problems(folder, manifest) == []
    assert (manifest.step, manifest.policy_version, manifest.metric) == (3, 4, {"acc": 0.5})
    assert manifest.models == ("actor", "critic") and manifest.optimizer
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {
        "manifest.json"
    }
    assert (
        set(manifest.files)
        == on_disk
        > {"driver.json", "config.yaml", "actor/__1_0.distcp", "hf/config.json"}
        and "experience/queue.json" in on_disk
    )
    assert metrics["checkpoint/bytes"] == sum(info.bytes for info in manifest.files.values())
    # Checksummed while they were written, and not read for it.
    weights = "hf/model.safetensors"
    assert manifest.files[weights] == file_info(folder / weights)
    names = {call.args[0].name for call in read.call_args_list}
    assert "config.json" in names and "model.safetensors" not in names
    assert metrics["checkpoint/held_s"] == pytest.approx(metrics["checkpoint/save_s"], abs=0.05)


def test_retention_goes_by_the_metric_of_checkpoints_before(model: Path, tmp_path: Path) -> None:
    save(make_writer(model, tmp_path), 1, acc=0.9)
    save(make_writer(model, tmp_path), 0, acc=1.0)
    (tmp_path / "checkpoints" / "step_0" / "manifest.json").write_text(
        "{}"
    )  # damaged: it counts for nothing
    made = make_writer(model, tmp_path, keep_last=1, keep_best=1)
    for step, value in ((2, 0.2), (3, 0.3)):
        save(made, step, acc=value)
    assert made.store.steps() == [1, 3]


def test_in_the_background_one_at_a_time(model: Path, tmp_path: Path) -> None:
    group = FakeGroup()
    made = make_writer(model, tmp_path, group, async_save=True)
    group.done = False
    assert save(made, 1) == {} and made.store.steps() == [] and made.poll() == {}
    group.done = True
    assert made.poll()["checkpoint/bytes"] > 0 and made.store.steps() == [1]
    save(made, 2)
    assert set(save(made, 3)) == {"checkpoint/save_s", "checkpoint/held_s", "checkpoint/bytes"}, (
        "of step 2"
    )
    assert made.store.steps() == [1, 2]
    made.finish()
    assert made.store.steps() == [1, 2, 3] and made.finish() == {}


class FullGroup(FakeGroup):
    """Ranks that find the disk full when their files are to be completed."""

    def call_all(self, phase: str, method: Any, *args: Any) -> list[Any]:
        if method is TrainWorker.finish_save:
            raise checkpointing.WorkerFailure(
                "save_checkpoint failed on rank 1: OSError: [Errno 28] No space left on device"
            )
        return super().call_all(phase, method, *args)


def test_what_is_drawn_while_a_save_is_waited_for_is_all_there(model: Path, tmp_path: Path) -> None:
    """The driver draws on where it waits for ranks; its position and queue are of one moment."""
    drawn = [0]

    class Drawing(FakeGroup):
        def call_all(self, phase: str, method: Any, *args: Any) -> list[Any]:
            drawn[0] += 1
            return super().call_all(phase, method, *args)

    def more(checkpoint: Path) -> None:
        (checkpoint / "queue.json").write_text(str(drawn[0]))

    made = make_writer(model, tmp_path, Drawing(), async_save=True, save_hf="always")
    for step in (1, 2):
        made.save(step, 1, lambda: {"drawn": drawn[0]}, {}, last=False, wait=False, more=more)
    made.finish()
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        state = json.loads((folder / "driver.json").read_text())
        assert str(state["drawn"]) == (folder / "queue.json").read_text()


def test_a_background_failure_is_raised_at_the_next_boundary(model: Path, tmp_path: Path) -> None:
    save(make_writer(model, tmp_path), 1)
    made = make_writer(model, tmp_path, FullGroup(), async_save=True)
    save(made, 2)
    with pytest.raises(
        RuntimeError,
        match="is full; the checkpoint under way was removed, those before it are complete",
    ):
        made.poll()
    assert made.store.steps() == [1] and made.store.clean() == [] and made.finish() == {}


@pytest.mark.parametrize("fault", ["driver", "actor"])
def test_a_save_that_fails_is_removed_after_all_ranks_have_written(
    fault: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class Slow(FakeGroup):
        def call_all(self, phase: str, method: Any, *args: Any) -> list[Any]:
            if method is not TrainWorker.finish_save:
                return super().call_all(phase, method, *args)
            folder = self.folders.pop(0)
            (folder / "__2_0.distcp").write_bytes(b"the last of it")  # the folder is there
            ended.append(folder.name)
            if (fault, folder.name) == ("actor", "actor"):
                raise checkpointing.WorkerFailure("save_checkpoint failed on rank 1: broken")
            return [{}]

    def unreadable(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the driver's files cannot be read")

    made = make_writer(model, tmp_path, Slow(), async_save=True)
    save(made, 1)
    if fault == "driver":
        monkeypatch.setattr(checkpointing, "infos_below", unreadable)
    with pytest.raises((OSError, RuntimeError), match=r"cannot be read|broken"):
        made.finish()
    assert ended == ["actor", "critic"]
    assert list(made.store.folder.iterdir()) == [] and made.finish() == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointWriter, "check_room", lambda self, export: None)
    save(make_writer(model, small_disk), 1)
    with pytest.raises(
        RuntimeError,
        match=r"is full; .* complete \(newest: none of this process\).*trainer.keep_last",
    ):
        save(make_writer(model, small_disk, FakeGroup(size=200_000)), 2)
    found, _ = newest_complete(Store(small_disk / "checkpoints"))
    assert (
        found is not None
        and found.manifest.step == 1
        and Store(small_disk / "checkpoints").clean() == []
    )


def test_too_little_room_is_said_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_writer(model, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        ValueError, match=r"a checkpoint takes about 0\.00 GiB and 0\.00 GiB are free\. Make room"
    ):
        save(made, 1)
    assert list(made.store.folder.iterdir()) == []


def test_size_on_disk() -> None:
    weights = {"actor": 100, "critic": 90}
    assert checkpoint_bytes(weights, "float32", optimizer=True, export=False) == 190 * 12
    assert checkpoint_bytes(weights, "bfloat16", optimizer=True, export=True) == 190 * 14 + 200
    assert checkpoint_bytes(weights, "bfloat16", optimizer=False, export=False) == 380
