"""`rlhf3d launch`: a job file for a cluster, from a configuration.

Invariant: nothing is started unless --submit is given, and then only after the file was written.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from rlhf3d.options import refuse_unused
from rlhf3d.paths import check_output
from rlhf3d.terminal import tell


def launch(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="local, slurm, kuberay, skypilot or ssh.")],
    config: Annotated[
        str, typer.Argument(help="YAML file, as the job will find it from its working folder.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Overrides, such as actor.optim.lr=1e-5."),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The job in miniature, on the nodes' CPUs.")
    ] = False,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes; default cluster.num_nodes.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, help="GPUs of a node; default cluster.gpus_per_node, 0 for a job on CPU."
        ),
    ] = None,
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Cores of a node; default by target.")
    ] = None,
    memory_gib_per_node: Annotated[
        int | None, typer.Option(min=1, help="Memory of a node, GiB.")
    ] = None,
    gpu_type: Annotated[
        str | None, typer.Option(help="SkyPilot's name of the GPU, such as H100.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Container image with rlhf3d (docker/).")
    ] = None,
    venv: Annotated[
        str, typer.Option(help="Environment with rlhf3d, where there is no image.")
    ] = ".venv",
    workdir: Annotated[
        str | None, typer.Option(help="Folder in which the job runs; default by target.")
    ] = None,
    volume: Annotated[
        str | None, typer.Option(help="Shared volume: claim (KubeRay) or volume (SkyPilot).")
    ] = None,
    mount: Annotated[str, typer.Option(help="Where it is mounted.")] = "/shared",
    time: Annotated[
        str | None, typer.Option(help="Time limit: 90m, 4h, 2d, HH:MM:SS, D-HH:MM:SS.")
    ] = None,
    grace: Annotated[
        str, typer.Option(help="Before its end, when the run is told to save: a step and more.")
    ] = "300s",
    retries: Annotated[int | None, typer.Option(min=0, help="Attempts after the first.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    queue: Annotated[
        str | None, typer.Option(help="Kueue queue that admits all pods or none.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Kubernetes namespace.")] = None,
    hosts: Annotated[
        str | None, typer.Option(help="ssh: hosts with commas, the first is this one.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1024, max=65535, help="Port of Ray's head; default 6379, on Slurm by job number."
        ),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for every process; several times.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job; default that of CONFIG.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the file there instead of printing it.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Hand the written file (--output) to the cluster.")
    ] = False,
) -> None:
    """Write the job file that runs CONFIG on a cluster; refuse a CONFIG that does not fit the nodes."""
    from rlhf3d.launch.job import Options, make_job, parse_duration
    from rlhf3d.launch.render import render, target_of
    from rlhf3d.launch.rules import USED_BY

    command = target_of(target).submit
    for option, targets in USED_BY.items():
        if target not in targets:
            why = f"`{target}` has no use for it; it is for {', '.join(targets)}"
            refuse_unused(context, [option], why)
    if image is not None:
        refuse_unused(context, ["venv"], "--image has its own environment")
    if time is None and target != "slurm":
        refuse_unused(context, ["grace"], "it is the end of --time")
    check_output("--output", output, is_file=True)
    pairs = [pair.partition("=") for pair in env or ()]
    if wrong := [
        name
        for name, equals, _ in pairs
        if not (equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name))
    ]:
        raise ValueError(f"--env {wrong[0]}: expected NAME=VALUE")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--env {max(names, key=names.count)}: given twice")
    options = Options(
        rehearse=rehearse,
        name=name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        memory_gib_per_node=memory_gib_per_node,
        gpu_type=gpu_type,
        image=image,
        venv=venv,
        workdir=workdir,
        volume=volume,
        mount=mount,
        time_s=None if time is None else parse_duration(time),
        grace_s=parse_duration(grace),
        retries=retries,
        partition=partition,
        account=account,
        queue=queue,
        namespace=namespace,
        hosts=tuple(filter(None, (hosts or "").split(","))),
        port=port,
        env={name: value for name, _, value in pairs},
    )
    text = render(target, make_job(target, config, overrides or [], options))
    if (
        target == "kuberay"
        and Path(config).is_absolute()
        and not Path(config).is_relative_to(mount)
    ):
        tell(
            f"note: the pods look for {config} at that path, and have --mount {mount} alone: give a path in it"
        )
    if output is None:
        if submit:
            raise ValueError("--submit needs --output FILE: the job file is kept beside the job")
        typer.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, text)
    typer.echo(
        f"wrote {output}; {'running' if submit else 'submit it with'}: {shlex.join([*command, str(output)])}"
    )
    if submit:
        _submit([*command, str(output)])


def _write(path: Path, text: str) -> None:
    """For nobody else's eyes: --env may hold a password."""
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def _submit(command: list[str]) -> None:
    try:
        environment = {
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **os.environ,
        }  # a new one for each job
        done = subprocess.run(command, env=environment, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]}: no such command here; submit the file where it is installed"
        ) from None
    raise typer.Exit(done.returncode)
