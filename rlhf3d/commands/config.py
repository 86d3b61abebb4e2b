"""`rlhf3d config`: the keys, or one configuration as a run would see it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf3d.options import Overrides


def config(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file to resolve; without it, all keys.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List every configuration key, or print a CONFIG as a run would see it."""
    from rlhf3d.config.derived import derive
    from rlhf3d.config.load import config_to_yaml
    from rlhf3d.config.resolve import load_run
    from rlhf3d.config.summary import summary_lines

    if config is None:
        _list_keys()
        return
    loaded = load_run(config, overrides or [])
    typer.echo(config_to_yaml(loaded), nl=False)
    for line in summary_lines(loaded, derive(loaded)):
        typer.echo(f"# {line}")


def _list_keys() -> None:
    import yaml

    from rlhf3d.config.keys import all_keys

    for item in all_keys():
        text = yaml.safe_dump(item.default, default_flow_style=True)
        default = text.removesuffix("...\n").strip()  # YAML's end mark behind a lone scalar
        kind = f"{item.kind}, {item.rules}" if item.rules else item.kind
        typer.echo(f"{item.name} = {default}  ({kind})\n    {item.doc}")
