"""What the wheels of requirements/gpu.lock hold, as requirements/gpu_wheels.json: the tests read it
instead of 9 GB.

`make lock GPU=1` runs it after every change of gpu.lock. It needs readelf, the network and 10 GB of
disk for 5 minutes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BUILT = "transformer-engine-torch"
"""The one package that is built against the others (Makefile)."""
GPU_LIBRARY = re.compile(r"lib(cu|nv|nccl|torch|c10|transformer_engine)")
BY_NAME = re.compile(rb"libcudnn_\w+\.so")
"""Libraries that cuDNN opens by name, so that no header lists them."""


SYMBOL = re.compile(r" (UND|\d+) ([^\s@]+)@@?(lib\S+)")
"""A line of `readelf --dyn-syms`: defined or not, a function, and the library that is its
version."""


class Owned(NamedTuple):
    """One line of a package's RECORD."""

    package: str
    path: PurePosixPath
    digest: str


def read_lock() -> list[str]:
    """The pins of requirements/gpu.lock."""
    return [
        line
        for line in (ROOT / "requirements/gpu.lock").read_text().splitlines()
        if not line.startswith("#")
    ]


def fingerprint(lock: list[str]) -> str:
    """What tells a table that was made from other pins."""
    return hashlib.sha256("\n".join(lock).encode()).hexdigest()


def read_records(folder: Path) -> list[Owned]:
    """Every file of every package installed in `folder`, but for the packages' own metadata."""
    return [
        owned
        for record in sorted(folder.glob("*.dist-info/RECORD"))
        for owned in _read_record(record)
    ]


def _read_record(record: Path) -> Iterator[Owned]:
    # A RECORD's folder is NAME-VERSION.dist-info.
    package = record.parent.name.split("-")[0].replace("_", "-").lower()
    for path, digest, _ in csv.reader(record.read_text().splitlines()):
        # Every package has its own metadata, which cannot conflict.
        if not path.startswith(record.parent.name):
            yield Owned(package, PurePosixPath(path), digest)


def find_conflicts(records: list[Owned]) -> dict[str, list[str]]:
    """Files that several packages own with different contents: the last one installed wins."""
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for package, path, digest in records:
        owners[str(path)][package] = digest
    return {
        path: sorted(found)
        for path, found in sorted(owners.items())
        if len(set(found.values())) > 1
    }


def find_modules(records: list[Owned]) -> dict[str, list[str]]:
    """Top-level modules and the packages they come from."""
    found: dict[str, set[str]] = defaultdict(set)
    for package, path, _ in records:
        name = path.parts[0].split(".")[0]
        if path.suffix in (".py", ".so") and name.isidentifier():
            found[name].add(package)
    return {name: sorted(packages) for name, packages in sorted(found.items())}


def find_needs(folder: Path, records: list[Owned]) -> dict[str, dict[str, list[str]]]:
    """GPU libraries that files need, which packages those are of (`by`), and which packages ship
    the library (`of`).
    """
    shipped: dict[str, set[str]] = defaultdict(set)
    needed: dict[str, set[str]] = defaultdict(set)
    for package, path, _ in records:
        if ".so" in path.suffixes:
            shipped[path.name].add(package)
            for name in _needed(folder / path):
                needed[name].add(package)
    return {
        name: {"by": sorted(needed[name]), "of": sorted(shipped[name])}
        for name in sorted(needed)
        if GPU_LIBRARY.match(name)
    }


def find_unresolved(folder: Path, records: list[Owned]) -> dict[str, list[str]]:
    """Functions of shipped libraries that packages call and the shipped versions do not have, and
    those packages.
    """
    shipped, defined = set(), set[str]()
    called: dict[str, set[str]] = defaultdict(set)
    for package, path, _ in records:
        if ".so" in path.suffixes:
            shipped.add(path.name)
            for section, function, library in _versioned_symbols(folder / path):
                if section == "UND":
                    called[f"{function}@{library}"].add(package)
                else:
                    defined.add(f"{function}@{library}")
    # Only calls into shipped libraries: others are the system's.
    missing = {call for call in called.keys() - defined if call.partition("@")[2] in shipped}
    return {call: sorted(called[call]) for call in sorted(missing)}


def _versioned_symbols(library: Path) -> list[tuple[str, str, str]]:
    table = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True
    )
    return SYMBOL.findall(table.stdout)


def _needed(library: Path) -> set[str]:
    header = subprocess.run(["readelf", "-d", library], capture_output=True, text=True)
    names = set(re.findall(r"\(NEEDED\).*\[(.*)\]", header.stdout))
    if library.name.startswith("libcudnn"):
        # cuDNN 9's files end in .so.9.
        names |= {f"{name.decode()}.9" for name in BY_NAME.findall(library.read_bytes())}
    return names


def main() -> int:
    """Install the locked wheels into a temporary folder and write what is in them."""
    lock = read_lock()
    # The one that is built has no wheel to look into.
    wheels = [line for line in lock if not line.startswith(f"{BUILT}==")]
    with tempfile.TemporaryDirectory(prefix="gpu_wheels.") as folder:
        uv = [
            Path(sys.executable).parent / "uv",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
        ]
        # The interpreter and the C library of the machines that install them (Makefile).
        where = [
            "--python-version",
            "3.12",
            "--python-platform",
            "x86_64-manylinux_2_31",
            "--requirements",
            "-",
        ]
        subprocess.run([*uv, *where], input="\n".join(wheels), text=True, check=True)
        records = read_records(Path(folder))
        table = {
            "lock": fingerprint(lock),
            "conflicts": find_conflicts(records),
            "needs": find_needs(Path(folder), records),
            "unresolved": find_unresolved(Path(folder), records),
            "modules": find_modules(records),
        }
    (ROOT / "requirements/gpu_wheels.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
