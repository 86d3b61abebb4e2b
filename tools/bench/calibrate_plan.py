"""Fit the planner's numbers of this machine to timed runs, as an entry for `rlhf3d plan --hardware
FILE`.

python tools/bench/calibrate_plan.py runs/quickstart runs/other --name laptop > my_hardware.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from calibrate import as_entry, fit, observe, planned_step_s

from rlhf3d.planning.hardware import load_hardware


def main() -> None:
    """Print the entry; on its first lines how near each run comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="Folders of runs (trainer.output_dir) of two steps or more.",
    )
    parser.add_argument(
        "--name", default="laptop", help="Hardware to start from, and the entry's name."
    )
    arguments = parser.parse_args()
    seen = [observe(folder) for folder in arguments.runs]
    hardware = fit(load_hardware()[arguments.name], seen)
    for run in seen:
        planned = planned_step_s(run, hardware)
        off = f"{planned / run.step_s - 1:+.0%}"
        print(f"# {run.folder}: measured {run.step_s:.1f} s a step, planned {planned:.1f} ({off})")
    entry = as_entry(hardware, f"fitted to {', '.join(map(str, arguments.runs))}")
    print(yaml.safe_dump({arguments.name: entry}, sort_keys=False), end="")


if __name__ == "__main__":
    main()
