"""The `rlhf3d` command: which commands there are, and what becomes of their errors.

Invariant: exit codes are 0 done, 1 the run failed, 2 the user's configuration or arguments, 75
stopped after a checkpoint (the same command continues), 130 interrupted; a user's mistake ends in
one screen of plain text, never in a traceback. A command is a function of `commands/`, which
imports nothing heavy before the command runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rlhf3d.commands.checkpoints import convert, inspect
from rlhf3d.commands.completion import PROGRAM, be_ready_to_complete, completion
from rlhf3d.commands.config import config
from rlhf3d.commands.data import check, prepare
from rlhf3d.commands.doctor import doctor
from rlhf3d.commands.errors import raised_by_us
from rlhf3d.commands.evaluate import evaluate
from rlhf3d.commands.plan import plan
from rlhf3d.commands.rehearse import rehearse
from rlhf3d.commands.replay import replay
from rlhf3d.commands.reshard import reshard
from rlhf3d.commands.results import compare, report, samples, watch
from rlhf3d.commands.train import train
from rlhf3d.ending import ending_at_once
from rlhf3d.launch.command import launch
from rlhf3d.options import Commands, show_version
from rlhf3d.terminal import tell, write_what_can_be_encoded

app = Commands(
    name=PROGRAM,
    no_args_is_help=True,
    add_completion=False,
    # `main` decides what of an error is shown.
    pretty_exceptions_enable=False,
)
for _command in (
    train,
    replay,
    plan,
    reshard,
    rehearse,
    launch,
    evaluate,
    samples,
    report,
    watch,
    compare,
    convert,
    inspect,
    completion,
):
    app.command()(_command)


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """PPO for language models: 3D-parallel training, vLLM rollouts, in-memory resharding."""


app.add_typer(config, name="config")
app.add_typer(doctor, name="doctor")

data = Commands(help="Data sets as parquet files of prompts.", no_args_is_help=True)
data.command()(prepare)
data.command()(check)
app.add_typer(data, name="data")


def main() -> None:
    """Run the command line as all that this process does."""
    with ending_at_once():
        run()


def run() -> None:
    """Run the command line; report mistakes of the user (exit code 2) and failures (1)."""
    # Before any output: messages have × and …, which an ASCII locale cannot print.
    write_what_can_be_encoded()
    be_ready_to_complete()
    try:
        app()
    except (ValueError, RuntimeError) as error:
        # A traceback belongs to faults of this code and of libraries: let Python print it.
        if not raised_by_us(error):
            raise
        tell(str(error))
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except OSError as error:
        # With a name it is a file of the user's: not there, not allowed, disk full.
        if error.filename is None:
            raise
        tell(f"{error.filename}: {error.strerror}")
        sys.exit(1)


if __name__ == "__main__":
    main()
