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
    return [
        (word, rest) for line in lines if line.strip() for word, _, rest in [line.partition(" ")]
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_copied_file_is_tracked_and_sent_to_the_builder(path: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = tracked.stdout.splitlines()
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [
        word for name, rest in instructions(path) if name == "COPY" for word in rest.split()[:-1]
    ]
    assert {"pyproject.toml", "rlhf3d", "megatron_patches", "configs"} <= set(sources)
    for source in sources:
        assert source in files or any(file.startswith(f"{source}/") for file in files), (
            f"{source} is not tracked"
        )
        assert not any(
            fnmatch.fnmatch(source, pattern.removeprefix("**/")) for pattern in ignored
        ), source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_pins_are_those_of_the_requirements(path: Path) -> None:
    wanted = dict(
        re.findall(
            r"^([\w.-]+)(?:\[.*\])?==([\w.+]+)", (ROOT / "requirements/gpu.txt").read_text(), re.M
        )
    )
    wanted["uv"] = re.findall(r"^UV_VERSION := (.*)$", (ROOT / "Makefile").read_text(), re.M)[0]
    found = re.findall(r"([\w.-]+)(?:\[\w+\])?==([\w.+]+)", path.read_text())
    assert found and all(wanted[name] == version for name, version in found), found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_environment_is_made_as_on_a_host(path: Path) -> None:
    """With what `make setup` wants to find, and for GPUs a compiler of CUDA 13 but no second
    cuDNN.
    """
    text = path.read_text()
    assert "g++" in text and " make " in text
    packages = [
        rest for name, rest in instructions(path) if name == "RUN" and "pip install" in rest
    ]
    if path.suffix == ".cpu":
        assert text.startswith("FROM python:3.11") and "make setup GPU=0" in packages[0]
    else:
        base = re.findall(r"^ARG BASE=(.*)$", text, re.M)[0]
        assert re.fullmatch(r"nvidia/cuda:13\.0\.\d-devel-ubuntu24\.04", base)
        assert "python3.12-dev" in text and packages[0].startswith("make setup GPU=1")
    assert len(packages) == 1
