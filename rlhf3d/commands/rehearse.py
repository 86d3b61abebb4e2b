"""`rlhf3d rehearse`: the job in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf3d.commands.overrides import Overrides
from rlhf3d.paths import check_output
from rlhf3d.rehearsal.shrink import MAX_RANKS


def rehearse(
    config: Annotated[Path, typer.Argument(help="The job's YAML file.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder, emptied first; default rehearsals/CONFIG."),
    ] = None,
    max_ranks: Annotated[
        int, typer.Option(min=1, help="At most N training processes.")
    ] = MAX_RANKS,
    model_config: Annotated[
        Path | None, typer.Option(help="Folder with config.json, if not model.path.")
    ] = None,
    as_gpu: Annotated[
        bool,
        typer.Option(
            "--as-gpu", help="One device per rank, and the order and rules of GPUs and NCCL."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the miniature, do not run it.")
    ] = False,
) -> None:
    """Run a job in miniature on CPU: same layouts and code path, two steps, saved and resumed.

    On this machine, or with cluster.ray_address=… over the cluster.num_nodes of a Ray cluster. If
    the first run was interrupted, the same command continues from its checkpoint; with
    trainer.resume_mode=never it begins again.

    Example: rlhf3d rehearse configs/math.yaml --as-gpu
    """
    from rlhf3d.rehearsal.run import prepare
    from rlhf3d.rehearsal.run import rehearse as run

    folder = output or Path("rehearsals") / config.stem
    check_output("--output", folder)
    # The folder is emptied: only one that a rehearsal wrote (it has job.yaml), or an empty one.
    if not (folder / "job.yaml").is_file() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are no rehearsal: name another --output")
    miniature = prepare(config, overrides or [], folder, max_ranks, model_config, as_gpu)
    typer.echo(f"miniature  {miniature.summary}")
    for note in miniature.notes:
        typer.echo(f"otherwise  {note}")
    if dry_run:
        typer.echo(f"written to {miniature.config}")
        return
    run(miniature, typer.echo)
    repeated = "resumed and repeated exactly"
    if not miniature.exact:
        repeated = "and resumed; in flight a step is not repeated, as timing decides what writes it"
    typer.echo(f"rehearsed  {config}: two steps, saved, {repeated}")
