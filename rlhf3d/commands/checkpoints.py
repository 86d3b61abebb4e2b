"""`rlhf3d convert` and `inspect`: checkpoints on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf3d.options import AsJson, option_groups
from rlhf3d.paths import check_output


@dataclass(frozen=True)
class Result:
    """What is written."""

    to: Annotated[
        Literal["hf", "megatron"] | None,
        typer.Option(help="Format to write; default the one that the source is not in."),
    ] = None
    role: Annotated[
        Literal["actor", "critic"] | None,
        typer.Option(help="Default the actor, or what the source is."),
    ] = None
    dtype: Annotated[
        Literal["stored", "bfloat16", "float16", "float32"],
        typer.Option(help="stored is bit for bit."),
    ] = "stored"
    max_shard_size: Annotated[float, typer.Option(min=1e-3, help="Largest file, GiB.")] = 4.0
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder with config.json and tokenizer; default that of the checkpoint."),
    ] = None


@option_groups
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Run, checkpoint (checkpoints/step_N), Megatron or Hugging Face folder."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Then compare every tensor, and the logits of Megatron and transformers.",
        ),
    ] = False,
    as_json: AsJson = False,
    *,
    result: Result,
) -> None:
    """Convert a Megatron checkpoint into a Hugging Face folder or back.

    Example: rlhf3d convert runs/quickstart model --dtype bfloat16 --verify
    """
    from rlhf3d.checkpoints.convert import Options
    from rlhf3d.checkpoints.convert_view import convert as run

    check_output("DESTINATION", destination)
    options = Options(result.to, result.role, result.dtype, result.max_shard_size, result.reference)
    try:
        report = run(source, destination, options, verify)
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        raise typer.Exit(130) from None
    report.view().show(as_json)


def inspect(
    path: Annotated[Path, typer.Argument(help="Run, checkpoint, Megatron or Hugging Face folder.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every file and compare its checksum.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a folder holds: model, size, layout, step, metric, and whether it is complete.

    Example: rlhf3d inspect runs/quickstart --deep
    """
    from rlhf3d.checkpoints.inspection import inspect as look
    from rlhf3d.checkpoints.inspection import inspection_view

    found = look(path, deep)
    inspection_view(found).show(as_json)
    for problem in found["problems"]:
        typer.echo(problem, err=True)
    raise typer.Exit(1 if found["problems"] else 0)
