"""Whether two runs are the same: metrics without times, and files to the bit."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from support.jobs import left_behind, read_rows, sample_rows, saved_steps

TIMES = (
    "timing_s/",
    "perf/",
    "async/",
    "sync/",
    "checkpoint/",
    "reward/scoring",
    "env/call_s/",
    "rollout/engine_restarts",
)
"""Beginnings of the names of seconds, and of what saves and syncs report about themselves."""


def untimed(run: Path) -> list[dict[str, Any]]:
    """The metrics, without times."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_rows(run)]


def digests(run: Path) -> dict[str, str]:
    """Of samples, and of the weights and optimizers of the last checkpoint."""
    last = run / "checkpoints" / f"step_{saved_steps(run)[-1]}"
    files = [*run.glob("samples/*"), *last.rglob("*.distcp"), *last.rglob("*.safetensors")]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def assert_same(run: Path, other: Path) -> None:
    """Two runs wrote the same metrics, samples, tokens and weights; nothing is left over."""
    assert untimed(run) == untimed(other)
    found = digests(run)
    assert found == digests(other)
    assert any(name.endswith(".distcp") for name in found), "weights are compared"
    assert left_behind() == set()


def asked(run: Path) -> list[Counter[str]]:
    """Of each training step, how often each prompt was answered."""
    steps = [row["step"] for row in read_rows(run) if row["step"] > 0]
    return [Counter(sample["prompt"] for sample in sample_rows(run, step)) for step in steps]
