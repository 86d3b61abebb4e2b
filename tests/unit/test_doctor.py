"""What the doctor finds, here and on machines that lack something."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from typer.testing import CliRunner

from rlhf3d.cli import app
from rlhf3d.doctor import Diagnosis, Finding, check_machine, check_packages, check_quickstart, render
from rlhf3d.machine import Machine

MACHINE = Machine(
    cores=4,
    memory_gib=16.0,
    memory_available_gib=12.0,
    shared_memory_gib=8.0,
    disk_gib=90.0,
    gpus=(),
    compiler="c++",
)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_here() -> None:
    """The environment the tests run in is the pinned one, and the doctor says so in both forms."""
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    wrong = [row for row in report["packages"] if not row["ok"]]
    assert wrong == []
    assert result.exit_code == 0
    assert report["healthy"] is True
    assert report["platform"] in ("cpu", "cuda")
    names = {row["name"] for row in report["packages"]}
    assert {"torch", "megatron-core", "ray", "pytest"} <= names
    assert "isend_alias" in {row["name"] for row in report["patches"]}


def test_packages() -> None:
    pyyaml = metadata.version("pyyaml")
    requirements = [
        f"pyyaml=={pyyaml}",
        "rich==0.0.1",
        "surely-not-installed==1.0",
        'cpu-part==1.0; extra == "cpu"',
        'gpu-part==1.0; extra == "gpu"',
        'dev-part==1.0; extra == "dev"',
    ]
    cpu = by_name(check_packages(requirements, "cpu"))
    assert cpu["pyyaml"].ok
    assert not cpu["rich"].ok
    assert (cpu["rich"].wanted, cpu["rich"].fix) == ("0.0.1", "make setup")
    assert cpu["surely-not-installed"].found == "not installed"
    assert cpu["cpu-part"].required
    assert "gpu-part" not in cpu
    assert not cpu["dev-part"].required
    gpu = by_name(check_packages(requirements, "cuda"))
    assert "cpu-part" not in gpu
    assert gpu["gpu-part"].fix == "uv pip install -r requirements/gpu.txt"


def test_machine() -> None:
    assert all(finding.ok for finding in check_machine(MACHINE))
    poor = by_name(check_machine(replace(MACHINE, compiler=None, memory_available_gib=2.0)))
    assert not poor["C++ compiler"].ok
    assert "install g++" in poor["C++ compiler"].fix
    assert not poor["memory"].ok
    assert not poor["memory"].required


def test_quickstart_files(tmp_path: Path) -> None:
    assert {finding.fix for finding in check_quickstart(tmp_path)} == {"make model", "make data"}


def test_only_required_things_make_it_ill() -> None:
    note = Finding("disk", "5 GiB", "1 GiB free", False, "free some space", required=False)
    lack = Finding("torch", "2.0", "not installed", False, "make setup")
    noted = Diagnosis("cpu", "why", [], [note])
    assert noted.healthy
    assert "optional: free some space" in render(noted)
    ill = Diagnosis("cpu", "why", [lack], [note])
    assert not ill.healthy
    text = render(ill)
    assert "MISSING  torch  not installed (wanted 2.0: make setup)" in text
    assert "run: make setup" in text
