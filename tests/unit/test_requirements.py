"""The pins of pyproject.toml, the requirement files and the lock say the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def read(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    return pins([line for line in lines if line])


def pins(lines: list[str]) -> dict[str, str]:
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}


def test_pins_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, extras = pins(project["dependencies"]), project["optional-dependencies"]
    cpu, gpu, lock = read("cpu.txt"), read("gpu.txt"), read("cpu.lock")
    assert cpu.items() - lock.items() == set()
    assert core | pins(extras["cpu"]) | pins(extras["dev"]) | {"setuptools": cpu["setuptools"]} == cpu
    assert core | pins(extras["gpu"]) == gpu
    assert all(specifier.startswith("==") for specifier in (*cpu.values(), *gpu.values(), *lock.values()))


def test_overrides_keep_what_they_exclude_out_of_the_lock() -> None:
    excluded = {"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python"}
    assert excluded <= set(read("overrides.txt"))
    assert excluded & set(read("cpu.lock")) == set()
