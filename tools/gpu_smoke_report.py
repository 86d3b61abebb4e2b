"""What tools/gpu_smoke.sh found, a line a run: parity of engine and trainer, speed, memory.

python tools/gpu_smoke_report.py FOLDER RUN [RUN ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf3d.observability.metrics import read_metrics

COLUMNS = {
    "canary, mean |diff|": "sync/canary_abs_diff",
    "log-prob mismatch, mean": "training/rollout_logprobs_diff_mean",
    "tokens/s a GPU": "perf/throughput",
    "generate s": "timing_s/generate",
    "update_actor s": "timing_s/update_actor",
    "update_critic s": "timing_s/update_critic",
    "sync_weights s": "timing_s/sync_weights",
}


def main() -> None:
    """Print the table: of each figure the last step's, which is past all warming up."""
    folder, *runs = sys.argv[1:]
    table = Table("run", *COLUMNS, "peak MiB in use")
    for run in runs:
        rows = read_metrics(Path(folder) / run)
        last = {name: value for row in rows for name, value in row.items()}
        used = [int(line) for line in (Path(folder) / f"{run}.memory").read_text().split() if line.isdigit()]
        cells = [f"{last[name]:.4g}" if name in last else "" for name in COLUMNS.values()]
        table.add_row(run, *cells, str(max(used, default=0)))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
