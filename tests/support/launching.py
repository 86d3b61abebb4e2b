"""`rlhf3d launch`, called with options that several tests share."""

from __future__ import annotations

import subprocess
from pathlib import Path

from typer.testing import CliRunner, Result

from rlhf3d import cli

ROOT = Path(__file__).parents[2]
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "4", "--time", "4h", "--workdir", "/shared/rlhf3d")
IMAGE = ("--image", "registry/rlhf3d:gpu")
SHARED = "trainer.output_dir=/shared/runs/math"
POD = ("kuberay", "configs/math.yaml", SHARED, "--image", "i", "--volume", "v")
SLURM = ("slurm", "configs/math.yaml")


def launch(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["launch", *arguments])


def refusal(*arguments: str) -> str:
    done = launch(*arguments)
    assert isinstance(done.exception, ValueError), done.stdout
    return str(done.exception)


def words_of(command: str) -> list[str]:
    """What the shell makes of a command."""
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout
    return printed.splitlines()
