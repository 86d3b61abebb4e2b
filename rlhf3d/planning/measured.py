"""Numbers of a GPU that were measured here, in place of those that `hardware.yaml` assumes.

Invariant: a file is written and read by the same checks: only numbers of `MEASURED`, each within
its range, of one device; what it does not hold stays assumed. Pure: JSON and numbers, no torch.

docs/planning.md describes the file and how each number is measured.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf3d.planning.hardware import Cluster

FORMAT = 1
DEFAULT = Path("runs/gpu_measured.json")
"""Where a file is looked for when none is given."""
MEASURED = {
    **dict.fromkeys(("memory_gib", "process_gib", "engine_context_gib", "engine_comm_gib"), 4096.0),
    **dict.fromkeys(
        ("matmul_efficiency", "memory_efficiency", "link_efficiency", "exchange_efficiency"), 1.0
    ),
    **dict.fromkeys(
        ("latency_s", "network_latency_s", "layer_overhead_s", "expert_overhead_s"), 1.0
    ),
    **dict.fromkeys(
        ("decode_overhead_s", "decode_sequence_s", "decode_kernel_s", "decode_eager_s"), 1.0
    ),
    **dict.fromkeys(("host_gbs", "sync_gbs"), 10_000.0),
    **dict.fromkeys(("sync_bucket_s", "rest_s"), 600.0),
}
"""The most that each can be; all are above 0."""
KEYS = ("format", "device", "source", "numbers")


@dataclass(frozen=True)
class Measured:
    """The contents of a file."""

    device: str
    source: str
    numbers: Mapping[str, float]


def check_measured(raw: Any, where: str) -> Measured:
    """A file's content.

    ValueError, naming `where` and the key, for anything else than the form above.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f'{where}: expected a JSON object with "format": {FORMAT}')
    if missing := [key for key in KEYS if key not in raw]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    if unknown := sorted(set(raw) - set(KEYS)):
        raise ValueError(f"{where}: has {', '.join(unknown)}; only {', '.join(KEYS)} are known")
    for key in ("device", "source"):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise ValueError(f"{where}: {key} = {raw[key]!r} is not a text")
    if not isinstance(raw["numbers"], dict):
        raise ValueError(
            f"{where}: numbers = {raw['numbers']!r} is not an object of names and numbers"
        )
    for name, value in raw["numbers"].items():
        _check_number(name, value, where)
    return Measured(
        raw["device"], raw["source"], {name: float(value) for name, value in raw["numbers"].items()}
    )


def _check_number(name: str, value: Any, where: str) -> None:
    if name not in MEASURED:
        near = difflib.get_close_matches(name, MEASURED, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(sorted(MEASURED))
        raise ValueError(f"{where}: numbers.{name} is not known; {hint}Known are {known}")
    # To Python true and false are integers.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= MEASURED[name]:
        most = f"{MEASURED[name]:g}"
        raise ValueError(
            f"{where}: numbers.{name} = {value!r} is not a number above 0 and up to {most}"
        )


def read_measured(path: Path) -> Measured:
    """A file. ValueError where it is not there, not JSON, or not of the form."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--measured: {path} cannot be read: {error}") from error
    return check_measured(raw, str(path))


def write_measured(path: Path, device: str, source: str, numbers: Mapping[str, float]) -> None:
    """Write a file that `read_measured` accepts.

    ValueError as there, before anything is written.
    """
    raw = {"format": FORMAT, "device": device, "source": source, "numbers": dict(numbers)}
    check_measured(raw, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, indent=2) + "\n")


def default_problem() -> list[str]:
    """Return what is wrong with the file at `DEFAULT`, if it is there."""
    try:
        if DEFAULT.is_file():
            read_measured(DEFAULT)
    except ValueError as error:
        return [f"{error}; remove the file, or write it again with pytest -m gpu"]
    return []


def with_measured(cluster: Cluster, given: Path | None) -> Cluster:
    """The cluster with numbers from the file `given`, or from `DEFAULT` where that is there and of
    this device.

    ValueError as `read_measured`, and where the file that was given is of another device.
    """
    if given is None and not DEFAULT.is_file():
        return cluster
    path = given or DEFAULT
    measured, hardware = read_measured(path), cluster.hardware
    if not hardware.is_device(measured.device):
        if given is None:
            return cluster
        raise ValueError(
            f"--measured: {path} is of {measured.device}, the plan for {hardware.name}; "
            "plan for that device with --gpus, or leave it out"
        )
    names = ", ".join(sorted(measured.numbers))
    note = f"{names} measured ({path}: {measured.source}), others from data sheets"
    # Every name in `MEASURED` is a field of `Hardware`, so that the file can replace it as it is.
    numbers: dict[str, Any] = dict(measured.numbers)
    return replace(cluster, hardware=replace(hardware, measured_here=note, **numbers))
