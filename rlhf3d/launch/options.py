"""The options of `rlhf3d launch`: what the configuration does not say.

Invariant: each option stands once: as a field here, with its type, default and help.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import typer

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
"""Name of an environment variable."""
USED_BY: dict[str, tuple[str, ...]] = {
    "cpus_per_node": ("slurm", "ssh", "kuberay", "skypilot"),
    "memory_gib_per_node": ("slurm", "kuberay", "skypilot"),
    "gpu_type": ("skypilot",),
    "image": ("slurm", "kuberay", "skypilot"),
    "venv": ("local", "slurm", "ssh", "skypilot"),
    "volume": ("kuberay", "skypilot"),
    "mount": ("kuberay", "skypilot"),
    "retries": ("slurm", "kuberay", "skypilot"),
    "partition": ("slurm",),
    "account": ("slurm",),
    "queue": ("kuberay",),
    "namespace": ("kuberay",),
    "hosts": ("ssh",),
    "port": ("slurm", "ssh", "skypilot"),
}
"""Options that not every target has a use for."""


@dataclass(frozen=True)
class Options:
    """The options of the command; None for what follows from the configuration or the target."""

    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The job in miniature, on the nodes' CPUs.")
    ] = False
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; default cluster.num_nodes.")] = (
        None
    )
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, help="GPUs of a node; default cluster.gpus_per_node, 0 for a job on CPU."
        ),
    ] = None
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Cores of a node; default by target.")
    ] = None
    memory_gib_per_node: Annotated[
        int | None, typer.Option(min=1, help="Memory of a node, GiB.")
    ] = None
    gpu_type: Annotated[
        str | None, typer.Option(help="SkyPilot's name of the GPU, such as H100.")
    ] = None
    image: Annotated[str | None, typer.Option(help="Container image with rlhf3d (docker/).")] = None
    venv: Annotated[str, typer.Option(help="Environment with rlhf3d, where there is no image.")] = (
        ".venv"
    )
    workdir: Annotated[
        str | None, typer.Option(help="Folder in which the job runs; default by target.")
    ] = None
    volume: Annotated[
        str | None, typer.Option(help="Shared volume: claim (KubeRay) or volume (SkyPilot).")
    ] = None
    mount: Annotated[str, typer.Option(help="Where the shared volume is mounted.")] = "/shared"
    time: Annotated[
        str | None, typer.Option(help="Time limit: 90m, 4h, 2d, HH:MM:SS, D-HH:MM:SS.")
    ] = None
    grace: Annotated[
        str,
        typer.Option(
            help="Time before the limit at which the run is asked to save: a step and a checkpoint."
        ),
    ] = "300s"
    retries: Annotated[int | None, typer.Option(min=0, help="Attempts after the first.")] = None
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None
    queue: Annotated[str | None, typer.Option(help="Kueue queue that admits all pods or none.")] = (
        None
    )
    namespace: Annotated[str | None, typer.Option(help="Kubernetes namespace.")] = None
    hosts: Annotated[
        str | None, typer.Option(help="ssh: hosts with commas, the first is this one.")
    ] = None
    port: Annotated[
        int | None,
        typer.Option(
            min=1024, max=65535, help="Port of Ray's head; default 6379, on Slurm by job number."
        ),
    ] = None
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for every process; several times.")
    ] = None
    name: Annotated[str | None, typer.Option(help="Name of the job; default that of CONFIG.")] = (
        None
    )

    @property
    def time_s(self) -> int | None:
        """Seconds of `time`."""
        return None if self.time is None else parse_duration(self.time)

    @property
    def grace_s(self) -> int:
        """Seconds of `grace`."""
        return parse_duration(self.grace)

    @property
    def host_names(self) -> tuple[str, ...]:
        """The names in `hosts`."""
        return tuple(filter(None, (self.hosts or "").split(",")))

    def environment(self) -> dict[str, str]:
        """Return the variables of `env`. Raises ValueError."""
        variables: dict[str, str] = {}
        for pair in self.env or ():
            name, equals, value = pair.partition("=")
            if not equals or not re.fullmatch(VARIABLE, name):
                raise ValueError(f"--env {name}: expected NAME=VALUE")
            if name in variables:
                raise ValueError(f"--env {name}: given twice")
            variables[name] = value
        return variables


def parse_duration(text: str) -> int:
    """Return the seconds of 90m, 4h, 2d, 3600s, HH:MM:SS or D-HH:MM:SS. Raises ValueError."""
    if match := re.fullmatch(r"(\d+)([smhd])", text):
        return int(match[1]) * SECONDS[match[2]]
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    raise ValueError(f"{text!r} is no duration: write 90m, 4h, 2d, HH:MM:SS or D-HH:MM:SS")
