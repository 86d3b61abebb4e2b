"""`rlhf3d data`: prompts into parquet files, and what is wrong with such files."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf3d.commands.environment import environment_of
from rlhf3d.data import sets
from rlhf3d.options import AsJson, option_groups, refuse_unused, scorers_of
from rlhf3d.paths import check_output


@dataclass(frozen=True)
class Contents:
    """What the data set is made of, where it can be chosen."""

    seed: Annotated[int | None, typer.Option(min=0, help="Seed of generated data.")] = None
    train_size: Annotated[int | None, typer.Option(min=1, help="Training rows to generate.")] = None
    test_size: Annotated[int | None, typer.Option(min=0, help="Held-out rows to generate.")] = None
    difficulty: Annotated[str | None, typer.Option(help="Difficulty of generated data.")] = None
    suffix: Annotated[str | None, typer.Option(help="Text appended to every question.")] = None


@option_groups
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(sets.names())}, or a file with make_map_fn.",
            autocompletion=lambda: list(sets.names()),
        ),
    ],
    source: Annotated[
        str | None, typer.Option(help="Folder or file of the data set, or hub.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default data/NAME.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train or test, where the file's name does not say it.")
    ] = None,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Leave out the questions of this parquet file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    *,
    contents: Contents,
) -> None:
    """Write a data set as train.parquet and test.parquet.

    Example: rlhf3d data prepare math500 --source hub --output data/math500
    """
    from rlhf3d.data.prepare import prepare as run

    given = {key: value for key, value in asdict(contents).items() if value is not None}
    folder = output or Path("data") / Path(name).stem
    check_output("--output", folder)
    name, source = os.path.expanduser(name), source and os.path.expanduser(source)
    files = run(
        name, source, folder, split=split, exclude=exclude or (), revision=revision, **given
    )
    for written in files:
        typer.echo(
            f"{written.path}: {written.rows} rows, {written.dropped} dropped, "
            f"sha256 {written.sha256[:12]}"
        )
        for reason, count in written.reasons.most_common():
            typer.echo(f"  {count} dropped: {reason}")
    notes: dict[str, None] = {}  # each once, in order
    for written in files:
        notes |= dict.fromkeys(written.notes)
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def check(
    context: typer.Context,
    files: Annotated[
        list[Path], typer.Argument(help="Parquet files of prompts, also compared with each other.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Model folder whose chat template is applied.")
    ] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt, tokens.")
    ] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="DATA_SOURCE=SCORER, as reward.scorers.")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A .jinja file in the place of the tokenizer's, as model.chat_template."),
    ] = None,
    reward: Annotated[
        Path | None, typer.Option(help="Python file with compute_score, instead of the scorers.")
    ] = None,
    environment: Annotated[
        Path | None,
        typer.Option(
            help="Configuration with the rows' environments: their tools count in the lengths, and "
            "no truth is scored where its rewards need none."
        ),
    ] = None,
    method: Annotated[
        Literal["strict", "flexible"], typer.Option(help="As reward.method.")
    ] = "strict",
    workers: Annotated[int, typer.Option(min=1, help="Scoring processes.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check prompt files as a run would read them.

    Rows, lengths, duplicates, overlap between files, and the scorer on the ground truth.

    Example: rlhf3d data check train.parquet test.parquet --scorer my/data=math_verify
    """
    from rlhf3d.data.check_view import check_view
    from rlhf3d.rewards.custom import load_custom_reward
    from rlhf3d.rewards.make import needs_rule
    from rlhf3d.rewards.truth_check import check_prompt_files

    loaded = None
    if tokenizer is not None:
        from rlhf3d.tokenizer.load import load_tokenizer

        loaded = load_tokenizer(os.path.expanduser(tokenizer), chat_template, "--chat-template")
    else:
        refuse_unused(context, ["max_prompt_length"], "prompts have lengths by a --tokenizer")
        refuse_unused(context, ["chat_template"], "it is for the --tokenizer")
    if reward is not None:
        refuse_unused(context, ["scorer", "method"], "--reward scores instead")
    custom = load_custom_reward(reward) if reward else None
    offered, graded = None, True
    if environment is not None:
        from rlhf3d.experience.environments import make_environments, offered_tools

        config = environment_of(environment)
        offered = offered_tools(make_environments(config.environment))
        by_rule = needs_rule(config.reward, config.custom_reward_function)
        graded = by_rule or custom is not None or bool(scorer)
    checked = check_prompt_files(
        files,
        loaded,
        max_prompt_length,
        custom,
        scorers_of(scorer),
        method,
        workers,
        offered=offered,
        graded=graded,
    )
    check_view(checked).show(as_json)
    raise typer.Exit(2 if checked.problems else 0)
