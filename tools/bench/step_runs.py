"""Complete training steps: runs of the command, and of TRL's trainer, each a process of its own.

Invariant: the first step of a run warms up and is left out; a run that fails shows its last lines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_job import Sizes

HERE = Path(__file__).resolve().parent
RUN_S = 3600.0
"""Deadline of a run."""
TRL_ENVIRONMENT = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
LAYOUTS = {
    "pp2dp2": ("actor.layout.pp=2", "actor.layout.dp=2"),
    "tp3pp2": ("actor.layout.tp=3", "actor.layout.pp=2"),
}


def trl_python(given: str | None) -> str | None:
    """The interpreter that has TRL: the one named, or this one where it is installed here.

    RuntimeError where the one named has not.
    """
    if given is None:
        return sys.executable if importlib.util.find_spec("trl") else None
    _run([given, "-c", "import trl"], TRL_ENVIRONMENT)
    return given


def run_ours(job: Path, output: Path, steps: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Train; the rows of metrics.jsonl of the steps that count."""
    shutil.rmtree(output, ignore_errors=True)
    last = [f"trainer.total_training_steps={steps + 1}", f"trainer.output_dir={output}"]
    command = [sys.executable, "-m", "rlhf3d.cli", "train", str(job), *overrides, *last]
    _run(command, {})
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def run_trl(
    python: str, sizes: Sizes, dtype: str, threads: int, steps: int, output: Path
) -> list[float]:
    """Train with TRL, weights in `dtype`; seconds of the steps that count."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    settings = {
        "model": os.path.abspath(sizes.model),
        "dtype": dtype,
        "data": os.path.abspath(sizes.data),
        "prompts": sizes.prompts,
        "completions": sizes.completions,
        "response_tokens": sizes.response_tokens,
        "steps": steps + 1,
        "output": str(output),
    }
    environment = {**TRL_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    _run([python, str(HERE / "step_trl.py"), json.dumps(settings)], environment)
    seconds = json.loads((output / "seconds.json").read_text())
    return list(seconds[1:])


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    try:
        subprocess.run(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=RUN_S,
        )
    except subprocess.CalledProcessError as error:
        last = "\n".join(error.stdout.splitlines()[-30:])
        shown = " ".join(command[:4])
        raise RuntimeError(f"{shown} … ended with {error.returncode}:\n{last}") from None
