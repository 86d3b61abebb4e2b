"""The GPU set's Megatron and Transformer Engine, as `make integration` unpacks them.

Invariant: a version is said once, in requirements/gpu.txt.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def version(package: str) -> str:
    """What requirements/gpu.txt pins."""
    pins = (ROOT / "requirements/gpu.txt").read_text()
    found = re.search(rf"^{package}(?:\[.*\])?==(\S+)", pins, re.MULTILINE)
    assert found, f"requirements/gpu.txt pins no {package}"
    return found[1]


def folder(package: str) -> Path:
    """Its sources."""
    return ROOT / ".venv/gpu-set" / f"{package}-{version(package)}"
