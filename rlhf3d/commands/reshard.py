"""`rlhf3d reshard`: how the weights of a run travel, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf3d.commands.overrides import Overrides
from rlhf3d.options import AsJson


def reshard(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run; of the model only config.json is read.")
    ],
    overrides: Overrides = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the plan (the default; nothing is started).")
    ] = True,
    gpus: Annotated[
        bool,
        typer.Option("--gpus", help="Plan for GPUs, one per training rank, on any machine."),
    ] = False,
    tensor: Annotated[
        str | None, typer.Option(help="Print the routes of these tensors; * stands for any text.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how weights go from training ranks into vLLM: bytes per rank, bound, routes.

    Example: rlhf3d reshard configs/math.yaml --gpus
    """
    from rlhf3d.config.resolve import load_run
    from rlhf3d.resharding.explain import explain_view, setup_of

    loaded = load_run(config, overrides or [])
    explain_view(setup_of(loaded, gpus), loaded.model.path, tensor).show(as_json)
