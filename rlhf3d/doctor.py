"""What is installed and found here, what is missing, and the command that mends it.

Invariant: wanted versions come from the package's own metadata, nowhere else; nothing is changed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import megatron_patches
from rlhf3d.machine import Machine, read_machine
from rlhf3d.parallel.platform import choose_platform

QUICKSTART_FILES = {
    "models/SmolLM2-135M-Instruct/config.json": "make model",
    "data/arithmetic/train.parquet": "make data",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    wanted: str
    found: str
    ok: bool
    fix: str = ""
    """Command or advice that mends it, where it is not ok."""
    required: bool = True
    """Whether a run is impossible without it."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything `rlhf3d doctor` reports."""

    platform: str
    reason: str
    """Why that platform was chosen."""
    packages: list[Finding]
    machine: list[Finding]
    patches: list[dict[str, str]] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Nothing that a run needs is missing."""
        return all(finding.ok for finding in [*self.packages, *self.machine] if finding.required)


def diagnose() -> Diagnosis:
    """Look at packages, machine, platform and patches."""
    try:
        platform = choose_platform("auto")
        kind, reason = platform.kind, platform.reason
    except ModuleNotFoundError as error:
        kind, reason = "cpu", f"{error.name} is not installed, so no GPU could be looked for"
    return Diagnosis(
        platform=kind,
        reason=reason,
        packages=check_packages(metadata.requires("rlhf3d") or [], kind),
        machine=check_machine(read_machine()) + check_quickstart(Path()),
        patches=[
            {
                "name": patch.name,
                "versions": patch.versions,
                "reason": patch.reason,
                "use": _patch_use(patch, kind),
            }
            for patch in megatron_patches.PATCHES
        ],
    )


def check_packages(requirements: list[str], kind: str) -> list[Finding]:
    """Found beside pinned, for the packages platform `kind` needs; those of the tests are not required."""
    extra = "gpu" if kind == "cuda" else "cpu"
    fix = "uv pip install -r requirements/gpu.txt" if kind == "cuda" else "make setup"
    findings = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        needed = marker is None or marker.evaluate({"extra": extra})
        if not needed and not (marker and marker.evaluate({"extra": "dev"})):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        ok = found != "not installed" and requirement.specifier.contains(found, prereleases=True)
        wanted = str(requirement.specifier).removeprefix("==")
        findings.append(_finding(requirement.name, wanted, found, ok, fix, needed))
    return sorted(findings, key=lambda finding: finding.name)


def check_machine(machine: Machine) -> list[Finding]:
    """Python, compiler, cores, memory, shared memory, disk, GPUs."""
    python = ".".join(map(str, sys.version_info[:3]))
    memory = f"{machine.memory_available_gib:.1f} GiB available of {machine.memory_gib:.1f}"
    gpus = ", ".join(name for name, _ in machine.gpus)
    compiler_fix = "install g++ (Debian: apt-get install g++)"
    shm, disk = machine.shared_memory_gib, machine.disk_gib
    return [
        _finding("python", "3.11", python, python.startswith("3.11."), "install Python 3.11, then make setup"),
        _finding("C++ compiler", "any", machine.compiler or "none", bool(machine.compiler), compiler_fix),
        _finding("CPU cores", "2", str(machine.cores), machine.cores >= 2, "expect slow steps", False),
        _finding("memory", "8 GiB", memory, machine.memory_available_gib >= 8, "close other programs", False),
        _finding("/dev/shm", "1 GiB", f"{shm:.1f} GiB free", shm >= 1, "container: --shm-size=1g", False),
        _finding("disk", "5 GiB", f"{disk:.1f} GiB free", disk >= 5, "free some space", False),
        _finding("GPUs", "none needed", gpus or "none", True, "", False),
    ]


def _finding(name: str, wanted: str, found: str, ok: bool, fix: str, required: bool = True) -> Finding:
    """A finding that keeps its fix only where it is needed."""
    return Finding(name, wanted, found, ok, "" if ok else fix, required)


def check_quickstart(root: Path) -> list[Finding]:
    """The files that `make train` makes on its own."""
    return [
        _finding(name, "present", "present" if ok else "not made yet", ok, fix, required=False)
        for name, fix in QUICKSTART_FILES.items()
        for ok in [(root / name).is_file()]
    ]


def _patch_use(patch: megatron_patches.Patch, kind: str) -> str:
    """Whether a run on platform `kind` applies the patch, and why not."""
    try:
        why_not = patch.not_needed_because(kind, megatron_patches.installed_version())
    except megatron_patches.PatchError as error:
        return str(error)
    return f"not needed: {why_not}" if why_not else "applied in every training process"


def to_json(diagnosis: Diagnosis) -> str:
    """The diagnosis for programs."""
    return json.dumps(asdict(diagnosis) | {"healthy": diagnosis.healthy}, indent=2)


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis for people."""
    lines = [f"platform  {diagnosis.platform}: {diagnosis.reason}"]
    for title, findings in (("packages", diagnosis.packages), ("machine", diagnosis.machine)):
        width = max((len(finding.name) for finding in findings), default=0)
        lines += ["", title, *(_line(finding, width) for finding in findings)]
    width = max((len(patch["name"]) for patch in diagnosis.patches), default=0)
    lines += ["", f"corrections to megatron-core {_version('megatron-core')}"]
    lines += [f"  {patch['name']:{width}}  {patch['use']}" for patch in diagnosis.patches]
    fixes = {
        finding.fix: finding.required
        for finding in sorted([*diagnosis.packages, *diagnosis.machine], key=lambda finding: finding.required)
        if not finding.ok
    }
    lines += ["", "all is well" if diagnosis.healthy else "a run is not possible yet"]
    return "\n".join(lines + [f"  {'run' if required else 'optional'}: {fix}" for fix, required in fixes.items()])


def _line(finding: Finding, width: int) -> str:
    mark = "ok" if finding.ok else "MISSING" if finding.required else "note"
    wanted = "" if finding.ok else f" (wanted {finding.wanted}: {finding.fix})"
    return f"  {mark:7}  {finding.name:{width}}  {finding.found}{wanted}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
