"""`rlhf3d reshard`: how the weights of a run travel, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf3d.options import AsJson, Overrides
from rlhf3d.terminal import Terminal


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
    """Show how a run moves its weights from training ranks into vLLM: bytes per rank, lower bound, routes."""
    import json

    from rlhf3d.config.load import load_config
    from rlhf3d.resharding.explain import as_json as to_json
    from rlhf3d.resharding.explain import render, setup_of

    loaded = load_config(config, overrides or [], files=False)
    setup = setup_of(loaded, gpus)
    if as_json:
        typer.echo(json.dumps(to_json(setup, tensor)))
    else:
        Terminal(soft_wrap=False).print(render(setup, loaded.model.path, tensor))
