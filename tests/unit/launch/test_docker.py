"""The images: what they copy is in the repository, and their pins are the requirements'."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) with continued lines joined."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [(word, rest) for line in lines if line.strip() for word, _, rest in [line.partition(" ")]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_copied_file_is_tracked_and_sent_to_the_builder(path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = tracked.stdout.splitlines()
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [word for name, rest in instructions(path) if name == "COPY" for word in rest.split()[:-1]]
    assert {"pyproject.toml", "rlhf3d", "megatron_patches", "configs"} <= set(sources)
    for source in sources:
        assert source in files or any(file.startswith(f"{source}/") for file in files), f"{source} is not tracked"
        assert not any(fnmatch.fnmatch(source, pattern.removeprefix("**/")) for pattern in ignored), source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_pins_are_those_of_the_requirements(path: Path) -> None:
    wanted = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==([\w.+]+)", (ROOT / "requirements/gpu.txt").read_text(), re.M))
    wanted["uv"] = re.findall(r"^UV_VERSION := (.*)$", (ROOT / "Makefile").read_text(), re.M)[0]
    found = re.findall(r"([\w.-]+)(?:\[\w+\])?==([\w.+]+)", path.read_text())
    assert found and all(wanted[name] == version for name, version in found), found


def test_the_compiler_and_make_are_there_where_make_setup_wants_them() -> None:
    text = (ROOT / "docker" / "Dockerfile.cpu").read_text()
    assert "g++" in text and " make " in text and text.startswith("FROM python:3.11")
