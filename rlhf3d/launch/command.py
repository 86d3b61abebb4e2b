"""`rlhf3d launch`: a job file for a cluster, from a configuration.

Invariant: nothing is started unless --submit is given, and then only after the file was written.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from rlhf3d.commands.overrides import Overrides
from rlhf3d.launch.options import USED_BY, Options
from rlhf3d.options import option_groups, refuse_unused
from rlhf3d.paths import check_output
from rlhf3d.terminal import tell


def _targets() -> list[str]:
    from rlhf3d.launch.render import TARGETS

    return list(TARGETS)


@option_groups
def launch(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="local, slurm, kuberay, skypilot or ssh.",
            autocompletion=_targets,
        ),
    ],
    config: Annotated[
        str, typer.Argument(help="YAML file, as the job will find it from its working folder.")
    ],
    overrides: Overrides = None,
    *,
    options: Options,
    output: Annotated[
        Path | None, typer.Option(help="Write the file there instead of printing it.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Hand the written file (--output) to the cluster.")
    ] = False,
) -> None:
    """Write the job file that runs CONFIG on a cluster.

    Refuse a CONFIG that does not fit the nodes.

    Example: rlhf3d launch slurm configs/math.yaml --nodes 2 --gpus-per-node 4 --output math.sh
    """
    from rlhf3d.launch.job import make_job
    from rlhf3d.launch.render import render, target_of

    command = target_of(target).submit
    _refuse_unused(context, target, options)
    check_output("--output", output, is_file=True)
    text = render(target, make_job(target, config, overrides or [], options))
    _note_absolute_path(target, Path(config), options.mount)
    if output is None:
        if submit:
            raise ValueError("--submit needs --output FILE: the job file is kept with the job")
        typer.echo(text, nl=False)
        return
    _write(output, text)
    then = "running" if submit else "submit it with"
    typer.echo(f"wrote {output}; {then}: {shlex.join([*command, str(output)])}")
    if submit:
        _submit([*command, str(output)])


def _refuse_unused(context: typer.Context, target: str, options: Options) -> None:
    for option, targets in USED_BY.items():
        if target not in targets:
            why = f"`{target}` has no use for it; it is for {', '.join(targets)}"
            refuse_unused(context, [option], why)
    if options.image is not None:
        refuse_unused(context, ["venv"], "--image has its own environment")
    if options.time is None and target != "slurm":
        refuse_unused(context, ["grace"], "it is the end of --time")


def _note_absolute_path(target: str, config: Path, mount: str) -> None:
    if target == "kuberay" and config.is_absolute() and not config.is_relative_to(mount):
        tell(
            f"note: the pods look for {config} at that path, and have --mount {mount} alone: "
            "give a path in it"
        )


def _write(path: Path, text: str) -> None:
    """Readable by its owner alone: --env may hold a password."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Created with this mode: never, not even for a moment, can others read it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)  # also of a file that was there
        file.write(text)


def _submit(command: list[str]) -> None:
    # A token of its own for each job, unless the user has one.
    # Later keys win: what the user has set stays.
    environment = {"RAY_AUTH_TOKEN": secrets.token_hex(32), **os.environ}
    try:
        done = subprocess.run(command, env=environment, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]}: no such command here; submit the file where it is installed"
        ) from None
    raise typer.Exit(done.returncode)
