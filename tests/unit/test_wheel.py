"""The wheel: whatever is read at run time is in it, and the command finds what ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("rlhf3d", "megatron_patches", "configs", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the wheel, built from a copy (setuptools writes beside its
    sources).
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    site = out / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def files_of(folder: Path) -> set[str]:
    """Its files, those behind the link to configs/ included."""
    found = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {str((Path(parent) / name).relative_to(folder.parent)) for name in names}
    return found


@pytest.mark.parametrize("package", ["rlhf3d", "megatron_patches"])
def test_every_file_of_the_package_is_in_it(installed: Path, package: str) -> None:
    assert files_of(ROOT / package) - files_of(installed / package) == set()


def test_the_command_works_away_from_the_sources(installed: Path, tmp_path: Path) -> None:
    """A shipped configuration by its name, and with it the shape of a model that is not here."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "rlhf3d.cli", "plan", "math.yaml", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
