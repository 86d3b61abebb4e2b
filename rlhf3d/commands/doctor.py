"""`rlhf3d doctor`: whether this machine, or a cluster, can run; why a run's two sides part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf3d.options import AsJson, Commands, DefaultCommand


class _MachineByDefault(DefaultCommand):
    """`rlhf3d doctor [--cluster …]` is `rlhf3d doctor machine [--cluster …]`."""

    default = "machine"


doctor = Commands(
    cls=_MachineByDefault,
    help="Check this machine or a cluster, or why engine and trainer of a run disagree.",
)


@doctor.command()
def machine(
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster (host:port, or auto): check every node of it instead."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show platform, versions, patches and memory; say how to fix what is missing (the default).

    Example: rlhf3d doctor --cluster 10.0.0.1:6379
    """
    if cluster is not None:
        from rlhf3d.placement.cluster_check import cluster_view, diagnose_cluster

        checked = diagnose_cluster(cluster)
        cluster_view(checked).show(as_json)
        raise typer.Exit(1 if checked.problems else 0)
    from rlhf3d.doctor import diagnose, doctor_view

    diagnosis = diagnose()
    doctor_view(diagnosis).show(as_json)
    raise typer.Exit(0 if diagnosis.healthy else 1)


@doctor.command()
def mismatch(
    run: Annotated[Path, typer.Argument(help="Folder of a run (trainer.output_dir).")],
    as_json: AsJson = False,
) -> None:
    """Say where log-probs of engine and trainer part in a run, and which cause explains it.

    Exit code 1 where a cause was found. Reads the tokens that trainer.sample_tokens keeps.

    Example: rlhf3d doctor mismatch runs/quickstart
    """
    from rlhf3d.evaluation.mismatch import examine, mismatch_view

    found = examine(run)
    mismatch_view(run, found).show(as_json)
    raise typer.Exit(1 if found.diagnosis.verdict == "cause" else 0)
