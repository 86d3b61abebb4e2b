"""`rlhf3d doctor`: whether this machine, or a cluster, can run."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf3d.options import AsJson


def doctor(
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster (host:port, or auto): check every node of it instead."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show platform, versions, patches and memory; say how to fix what is missing.

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
