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
    """List every configuration key with default and meaning, or print a CONFIG as a run would see it."""
    from rlhf3d.config.derived import derive, summary_lines
    from rlhf3d.config.load import config_to_yaml, load_config

    if config is None:
        _list_keys()
        return
    loaded = load_config(config, overrides or [], files=False)
    typer.echo(config_to_yaml(loaded), nl=False)
    for line in summary_lines(loaded, derive(loaded)):
        typer.echo(f"# {line}")


def _list_keys() -> None:
    import yaml

    from rlhf3d.config.docs import field_docs

    for item in field_docs():
        text = yaml.safe_dump(item.default, default_flow_style=True)
        default = text.removesuffix("...\n").strip()  # YAML's end mark behind a lone scalar
        typer.echo(f"{item.name} = {default}  ({item.kind})\n    {item.doc}")
