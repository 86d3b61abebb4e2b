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


def untimed(run: Path, last: int) -> list[dict[str, Any]]:
    """The metrics up to a step, without times."""
    rows = [row for row in read_rows(run) if row["step"] <= last]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def digests(run: Path, last: int, whole: bool = True) -> dict[str, str]:
    """Of samples up to a step, and of the weights and optimizers of its checkpoint.

    `whole`: and of what it has ahead, and of the exported model.
    """
    saved = run / "checkpoints" / f"step_{last}"
    files = [*saved.rglob("*.distcp"), *(saved.rglob("*.safetensors") if whole else ())]
    for file in run.glob("samples/*"):
        if int(file.stem.rpartition("_")[2]) <= last:
            files.append(file)
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def assert_same(run: Path, other: Path, last: int | None = None) -> None:
    """Two runs wrote the same metrics, samples, tokens and weights; nothing is left over.

    Up to a step with a checkpoint, by default the first run's last.
    """
    last = saved_steps(run)[-1] if last is None else last
    rows = untimed(run, last)
    assert rows[-1]["step"] == last and rows == untimed(other, last)
    # A run that ends has nothing ahead, and exports its model.
    whole = last == saved_steps(run)[-1] == saved_steps(other)[-1]
    found = digests(run, last, whole)
    assert found == digests(other, last, whole)
    assert any(name.endswith(".distcp") for name in found), "weights are compared"
    assert left_behind() == set()


def asked(run: Path) -> list[Counter[str]]:
    """Of each training step, how often each prompt was answered."""
    steps = [row["step"] for row in read_rows(run) if row["step"] > 0]
    return [Counter(sample["prompt"] for sample in sample_rows(run, step)) for step in steps]
