"""`rlhf3d config`: the keys, one configuration as a run would see it, or another framework's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf3d.commands.overrides import Overrides, keys_of
from rlhf3d.options import AsJson, Commands, DefaultCommand
from rlhf3d.paths import check_output

if TYPE_CHECKING:
    from rlhf3d.config.convert.given import Given
    from rlhf3d.config.convert.rules import Table


class _ShowByDefault(DefaultCommand):
    """`rlhf3d config [CONFIG]` is `rlhf3d config show [CONFIG]`."""

    default = "show"


Output = Annotated[Path | None, typer.Option(help="File to write; default standard output.")]
"""Of a converted configuration."""


def _keys_of_verl(incomplete: str) -> list[tuple[str, str]]:
    from rlhf3d.config.convert.verl.table import VERL

    return keys_of(VERL, incomplete)


def _keys_of_trl(incomplete: str) -> list[tuple[str, str]]:
    from rlhf3d.config.convert.trl.table import TRL

    return keys_of(TRL, incomplete)


def _keys_of_nemo_rl(incomplete: str) -> list[tuple[str, str]]:
    from rlhf3d.config.convert.nemo_rl.table import NEMO_RL

    return keys_of(NEMO_RL, incomplete)


config = Commands(
    cls=_ShowByDefault,
    help="List every configuration key, show a CONFIG as a run would see it, or convert that of "
    "another framework.",
)


@config.command()
def show(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file to resolve; without it, all keys.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List every configuration key, or print a CONFIG as a run would see it (the default).

    Example: rlhf3d config configs/quickstart.yaml rollout.n=4
    """
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


@config.command("from-verl")
def from_verl(
    file: Annotated[
        Path, typer.Argument(help="verl's YAML, or a run script that calls verl (nothing is run).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides with verl's names, such as trainer.nnodes=2.",
            autocompletion=_keys_of_verl,
        ),
    ] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Convert a verl configuration and say what became of each key.

    Exit code 2 where something is left for you to set.

    Example: rlhf3d config from-verl run_grpo.sh trainer.nnodes=2 --output mine.yaml
    """
    from rlhf3d.config.convert.verl.read import read_verl
    from rlhf3d.config.convert.verl.table import VERL

    # As a path for any user: a run here reads ~ itself.
    given = read_verl(file, overrides or [], {**os.environ, "HOME": "~"})
    _convert(file, given, VERL, output, as_json)


@config.command("from-trl")
def from_trl(
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML of `trl grpo`, a script that calls TRL, or a Python file with a GRPOConfig "
            "(nothing is run)."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides with TRL's names, such as num_processes=8.",
            autocompletion=_keys_of_trl,
        ),
    ] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Convert what TRL's GRPO was given and say what became of each key.

    Exit code 2 where something is left for you to set.

    Example: rlhf3d config from-trl grpo.yaml num_processes=8 --output mine.yaml
    """
    from rlhf3d.config.convert.trl.read import read_trl
    from rlhf3d.config.convert.trl.table import TRL

    given = read_trl(file, overrides or [], {**os.environ, "HOME": "~"})
    _convert(file, given, TRL, output, as_json)


@config.command("from-nemo-rl")
def from_nemo_rl(
    file: Annotated[
        Path,
        typer.Argument(help="NeMo-RL's YAML, beside the files that its `defaults:` name."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides with NeMo-RL's names, such as cluster.num_nodes=2.",
            autocompletion=_keys_of_nemo_rl,
        ),
    ] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Convert a GRPO recipe of NeMo-RL and say what became of each key.

    Exit code 2 where something is left for you to set.

    Example: rlhf3d config from-nemo-rl grpo_math_8B.yaml cluster.num_nodes=2 --output mine.yaml
    """
    from rlhf3d.config.convert.nemo_rl.read import read_nemo_rl
    from rlhf3d.config.convert.nemo_rl.table import NEMO_RL

    _convert(file, read_nemo_rl(file, overrides or []), NEMO_RL, output, as_json)


def _convert(file: Path, given: Given, table: Table, output: Path | None, as_json: bool) -> None:
    """Write what was given as a configuration of ours, and say what became of each key."""
    from rlhf3d.config.convert.apply import convert
    from rlhf3d.config.convert.report import conversion_view

    check_output("--output", output, is_file=True)
    conversion = convert(given, table)
    lines = [f"# {file.name}, a configuration of {table.framework}, converted by `rlhf3d config`"]
    lines += [f"# to set: {text}" for text in conversion.to_set]
    text = "\n".join(lines) + f"\n{conversion.to_yaml()}"
    if output is not None:
        output.write_text(text, encoding="utf-8")
    elif not as_json:
        typer.echo(text, nl=False)
    # Beside a configuration on standard output, the report is on the other stream.
    view = conversion_view(str(file), table.framework, conversion)
    view.show(as_json, stderr=output is None and not as_json)
    if conversion.to_set:
        raise typer.Exit(2)


def _list_keys() -> None:
    import yaml

    from rlhf3d.config.keys import all_keys

    for item in all_keys():
        text = yaml.safe_dump(item.default, default_flow_style=True)
        default = text.removesuffix("...\n").strip()  # YAML's end mark behind a lone scalar
        kind = f"{item.kind}, {item.rules}" if item.rules else item.kind
        typer.echo(f"{item.name} = {default}  ({kind})\n    {item.doc}")
