"""`rlhf3d doctor`: whether this machine, or a cluster, can run; why a run's two sides part."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf3d.commands.overrides import Overrides
from rlhf3d.options import AsJson, Commands, DefaultCommand

if TYPE_CHECKING:
    from rlhf3d.trainer.preemption import PreemptionHandler


class _MachineByDefault(DefaultCommand):
    """`rlhf3d doctor [--cluster …]` is `rlhf3d doctor machine [--cluster …]`."""

    default = "machine"


doctor = Commands(
    cls=_MachineByDefault,
    help="Check this machine or a cluster, or why engine and trainer disagree.",
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
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CONFIG", help="Folder of a run (trainer.output_dir), or a YAML file."
        ),
    ],
    overrides: Overrides = None,
    answers: Annotated[
        int, typer.Option(min=1, help="Answers that are compared, of a configuration.")
    ] = 32,
    float32: Annotated[
        bool, typer.Option(help="Start a configuration a second time, in float32.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Say where log-probs of engine and trainer part, and which cause explains it.

    Of a run, from the tokens that trainer.sample_tokens keeps. Of a configuration by starting its
    engines and its actor: no training. Exit code 1 where a cause was found.

    Example: rlhf3d doctor mismatch configs/quickstart.yaml model.dtype=bfloat16
    """
    if source.suffix in (".yaml", ".yml"):
        from rlhf3d.commands.train import ended

        work = partial(_mismatch_of_config, source, overrides or [], answers, float32, as_json)
        raise typer.Exit(ended(work))
    if overrides:
        raise ValueError(f"{overrides[0]}: keys are changed in a configuration, not in a run")
    from rlhf3d.evaluation.mismatch import examine, mismatch_view

    found = examine(source)
    mismatch_view(source, found).show(as_json)
    raise typer.Exit(1 if found.diagnosis.verdict == "cause" else 0)


def _mismatch_of_config(
    path: Path,
    overrides: list[str],
    answers: int,
    float32: bool,
    as_json: bool,
    preemption: PreemptionHandler,
) -> int:
    from rlhf3d.evaluation.mismatch_config import tried_view, try_config
    from rlhf3d.planning.view import show_memory

    show = None if as_json else show_memory
    tried = try_config(path, overrides, answers, float32, preemption, show)
    tried_view(tried).show(as_json)
    return 1 if tried.finding.fault else 0
