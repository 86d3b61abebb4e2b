"""`rlhf3d replay`: a run again from its journal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf3d.commands.train import ended
from rlhf3d.paths import check_output

if TYPE_CHECKING:
    from rlhf3d.trainer.preemption import PreemptionHandler


def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run (trainer.output_dir).")],
    until: Annotated[
        int | None, typer.Option(min=1, help="Last step; default the last of the run.")
    ] = None,
    after: Annotated[
        int, typer.Option(min=0, help="Begin after this step, at which the run was resumed.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder, emptied first; default RUN/replay.")
    ] = None,
) -> None:
    """Run training again as its journal says, and compare it with the run bit by bit.

    What depended on the time (which requests were together in an engine, when new weights came) is
    as it was. Exit code 1 where samples or metrics differ; the first difference is named.

    Example: rlhf3d replay runs/quickstart --until 4
    """
    if output is not None:
        check_output("--output", output)
    raise typer.Exit(ended(partial(_replay, run, after, until, output)))


def _replay(
    run: Path, after: int, until: int | None, output: Path | None, preemption: PreemptionHandler
) -> int:
    from rlhf3d.config.load import ConfigError
    from rlhf3d.observability.same_run import first_difference
    from rlhf3d.placement.script import CAUSES
    from rlhf3d.planning.view import show_memory
    from rlhf3d.preflight import preflight
    from rlhf3d.trainer.replay import prepare

    job = prepare(run, after, until, output)
    for note in job.notes:
        typer.echo(note)
    if problems := preflight(job.config, show=show_memory):
        raise ConfigError(problems, f"This machine cannot run {run} again")
    from rlhf3d.trainer.run import run_training

    if code := run_training(job.config, preemption, job.script):
        return code
    steps = f"steps {after + 1} to {job.script.until} of {run}"
    if difference := first_difference(run, job.output, after, job.script.until):
        typer.echo(f"differs    {steps}: {difference}\n{CAUSES}")
        return 1
    typer.echo(f"the same   {steps}: samples and metrics to the bit, times apart")
    return 0
