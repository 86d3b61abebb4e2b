"""How long the reshard plan of a large job takes to make, how much memory, and how near its bytes
are to the least.

Invariant: each row is planned in a fresh process; the exit status is 1 when one takes more than 10
s of one core or 2 GiB, the limits that let every process of a job make its own plan at start.

`received` is what crosses from another device into one that serves, bytes of one sync in bfloat16.
`bound`: what an engine rank needs less what a training rank can have of it, the mean over all (for
dense models that share out evenly, (n - g) / (n g) of the model: n training shards, engines of g
ranks). `full gather`: every rank gets the whole model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.models.spec import ModelSpec, check_layout, load_spec
from rlhf3d.models.weights import hf_tensors
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.resharding.plan import ReshardPlan
from rlhf3d.resharding.sites import Sites
from rlhf3d.resharding.tables import plan_sync

LIMIT_S, LIMIT_BYTES = 10.0, 2 << 30
ITEM_BYTES = 2


@dataclass(frozen=True)
class Job:
    """A model, its training layout, and engines on the same GPUs, eight a node."""

    spec: ModelSpec
    layout: ParallelLayout
    engine_tp: int

    @property
    def engines(self) -> int:
        """As many as the GPUs hold."""
        return self.layout.world_size // self.engine_tp


def published(name: str) -> ModelSpec:
    """The shape of a model whose config.json is in configs/models."""
    folder = Path(__file__).parents[2] / "configs" / "models" / name
    return load_spec(folder, with_weights=False)


JOBS = {
    "llama-3-405b": Job(
        published("Llama-3.1-405B-Instruct"),
        ParallelLayout(8, 16, 8, first_stage_layers=7, last_stage_layers=7),
        8,
    ),
    "llama-3-70b": Job(published("Llama-3.1-70B-Instruct"), ParallelLayout(8, 4, 2), 8),
    "qwen3-235b-a22b": Job(
        published("Qwen3-235B-A22B"),
        ParallelLayout(4, 16, 4, ep=8, first_stage_layers=5, last_stage_layers=5),
        8,
    ),
    "smollm2-135m": Job(published("SmolLM2-135M-Instruct"), ParallelLayout(3, 2), 1),
}


def measure(name: str) -> dict[str, Any]:
    """Plan one job in this process."""
    job = JOBS[name]
    check_layout(job.spec, job.layout)
    start = time.process_time()
    plan = plan_sync(
        job.spec, job.layout, Sites.gpus(job.layout.world_size, 8), job.engines, job.engine_tp
    )
    traffic = plan.traffic
    seconds = time.process_time() - start
    # ru_maxrss is in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    whole = sum(_product(shape) for shape in hf_tensors(job.spec, "lm").values())
    shards = job.layout.tp * job.layout.pp
    return {
        "model": name,
        "training": str(job.layout),
        "ranks": job.layout.world_size,
        "engines": job.engines,
        "engine_tp": job.engine_tp,
        "cpu_s": seconds,
        "peak_bytes": peak,
        "ops": sum(traffic.ops),
        "received_min_bytes": min(traffic.received) * ITEM_BYTES,
        "received_max_bytes": max(traffic.received) * ITEM_BYTES,
        "bound_bytes": _least_received(plan) * ITEM_BYTES,
        "full_gather_bytes": (shards - 1) / shards * whole * ITEM_BYTES,
    }


def _least_received(plan: ReshardPlan) -> float:
    """Elements that an engine rank must get on average, wherever the engine ranks are put: a rank
    on every GPU.
    """
    keeps: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for index, groups in enumerate(plan.groups):
        for group in groups:
            for rank in group.holders:
                keeps[rank][index] += group.elements
    ranks = plan.shards.world_size
    needed = sum(plan.traffic.needed) / len(plan.destinations)
    return needed - sum(max(keeps[rank].values()) for rank in range(ranks)) / ranks


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def measure_apart(name: str) -> dict[str, Any]:
    """Plan one job in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--here", name]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stderr}")
    row: dict[str, Any] = json.loads(run.stdout)
    return row


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption="GB of bfloat16 per engine rank and sync; CPU seconds of one core")
    table.add_column("model")
    table.add_column("training → engines")
    for column in (
        "plan s",
        "peak MiB",
        "ops",
        "received GB",
        "bound GB",
        "full gather GB",
        "saved",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        low, high, bound, full = (
            row[f"{key}_bytes"] / 1e9
            for key in ("received_min", "received_max", "bound", "full_gather")
        )
        table.add_row(
            row["model"],
            f"{row['training']} → {row['engines']} × TP{row['engine_tp']}",
            f"{row['cpu_s']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['ops']:,}",
            f"{low:.3f} … {high:.3f}",
            f"{bound:.3f}",
            f"{full:.3f}",
            f"{full / high:.2f} ×",
        )
    Console(width=max(150, Console().width)).print(table)


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=JOBS, action="append", help="this job alone (may be repeated)"
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--here", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.here)))
        return 0
    rows = [measure_apart(name) for name in args.only or JOBS]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)
    missed = [row for row in rows if row["cpu_s"] > LIMIT_S or row["peak_bytes"] > LIMIT_BYTES]
    for row in missed:
        print(
            f"{row['model']}: {row['cpu_s']:.1f} s and {row['peak_bytes'] / 2**20:.0f} MiB; "
            f"the limits are {LIMIT_S:.0f} s and {LIMIT_BYTES >> 20} MiB",
            file=sys.stderr,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
