"""How near the planner's step time comes: each run planned with numbers fitted to the others.

    python tools/bench/plan_accuracy.py runs/a runs/b runs/c runs/d    # of runs that are there
    python tools/bench/plan_accuracy.py --run runs/accuracy            # makes four first

The four take about 10 minutes on a quiet machine; they are the quickstart's first two steps in
different layouts. Every figure is of the phases from generate to update_actor; sync_weights, which
a canary makes several times longer in the first steps, is left out of both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from calibrate import Observation, fit, observe, planned_step_s, predict

from rlhf3d.planning.hardware import load_hardware

LAYOUTS = {
    "pp2dp2": (),
    "tp3pp2": ("actor.layout.tp=3", "actor.layout.dp=1"),
    "dp2": ("actor.layout.pp=1",),
    "pp2": ("actor.layout.dp=1",),
}
SHORT = (
    "trainer.total_training_steps=2",
    "trainer.val_before_train=false",
    "trainer.test_freq=0",
    "data.val_max_samples=4",
)


def main() -> None:
    """Make runs if asked to, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="Folders of runs (trainer.output_dir).")
    parser.add_argument("--run", type=Path, help="Folder to make the four runs in.")
    parser.add_argument("--config", default="configs/quickstart.yaml", help="What they run.")
    arguments = parser.parse_args()
    folders = list(arguments.runs)
    if arguments.run is not None:
        folders += [make_run(arguments.config, arguments.run, name) for name in LAYOUTS]
    seen = [observe(folder) for folder in folders]
    if len(seen) < 2:
        parser.error("give two runs or more: each is planned from the others")
    print(
        "| run | layout | measured s | planned s | off | phases, measured → planned |\n"
        "|---|---|---|---|---|---|"
    )
    for run in seen:
        print(row(run, [other for other in seen if other is not run]))


def make_run(config: str, folder: Path, name: str) -> Path:
    """Two steps in one layout."""
    output = folder / name
    command = [
        sys.executable,
        "-m",
        "rlhf3d.cli",
        "train",
        config,
        *SHORT,
        *LAYOUTS[name],
        f"trainer.output_dir={output}",
    ]
    subprocess.run([*command, "trainer.save_at_end=false"], check=True)
    return output


def row(run: Observation, others: list[Observation]) -> str:
    """One run, planned from the others."""
    hardware = fit(load_hardware()["laptop"], others)
    planned, plan = planned_step_s(run, hardware), predict(run, hardware)
    phases = {phase.phase: phase.total for phase in plan.phases}
    each = ", ".join(
        f"{name} {seconds:.1f} → {phases[name]:.1f}" for name, seconds in run.seconds.items()
    )
    layout = run.config.actor.layout
    return (
        f"| {run.folder.name} | TP{layout.tp}×PP{layout.pp}×DP{layout.dp} | {run.step_s:.1f} | "
        f"{planned:.1f} | {planned / run.step_s - 1:+.0%} | {each} |"
    )


if __name__ == "__main__":
    main()
