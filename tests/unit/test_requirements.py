"""The pins of pyproject.toml, the requirement files and the lock say the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


SETS = ("cpu", "gpu")


def read(name: str) -> dict[str, str]:
    lines = (
        line.split("#")[0].strip()
        for line in (ROOT / "requirements" / name).read_text().splitlines()
    )
    return pins([line for line in lines if line])


def pins(lines: list[str]) -> dict[str, str]:
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}


@pytest.mark.parametrize("name", SETS)
def test_a_set_pins_what_the_package_declares_and_its_lock_holds_it(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted, lock = read(f"{name}.txt"), read(f"{name}.lock")
    declared = pins(project["dependencies"]) | pins(extras[name])
    assert wanted.items() - lock.items() == set()
    assert all(pin.startswith("==") for pin in (*wanted.values(), *lock.values()))
    assert declared.keys() <= wanted.keys()
    assert wanted.keys() - declared.keys() <= pins(extras["dev"]).keys() | {"setuptools", "wheel"}
    for package, allowed in (declared | pins(extras["dev"])).items():
        if package in wanted:
            assert SpecifierSet(allowed).contains(wanted[package].removeprefix("==")), package


@pytest.mark.parametrize("name", SETS)
def test_overrides_keep_what_they_exclude_out_of_the_lock(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}-overrides.txt").read_text().splitlines()
    excluded = {
        line.split(";")[0].strip() for line in lines if line.endswith("; sys_platform == 'never'")
    }
    assert excluded
    assert excluded & set(read(f"{name}.lock")) == set()
