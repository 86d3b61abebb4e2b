"""`rlhf3d plan`: memory and time of a run before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf3d.commands.overrides import Overrides
from rlhf3d.options import AsJson, option_groups, refuse_unused
from rlhf3d.paths import check_output

if TYPE_CHECKING:
    from rlhf3d.config.environment import EnvironmentConfig
    from rlhf3d.config.schema import DataConfig
    from rlhf3d.planning.job import Lengths


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    gpus: Annotated[
        str | None,
        typer.Option(help="Devices, such as 8xH100; default those of the configuration."),
    ] = None
    hardware: Annotated[
        Path | None, typer.Option(help="YAML file that describes your own hardware.")
    ] = None
    measured: Annotated[
        Path | None,
        typer.Option(
            help="Numbers measured on this GPU; default runs/gpu_measured.json, if it is there."
        ),
    ] = None


@dataclass(frozen=True)
class Workload:
    """What the configuration does not say about model and data."""

    model_config: Annotated[
        Path | None, typer.Option(help="A config.json, or its folder, instead of model.path.")
    ] = None
    prompt_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean prompt; default half the longest.")
    ] = None
    response_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean completion; default half the longest.")
    ] = None
    turns: Annotated[
        float | None,
        typer.Option(min=1, help="Mean turns with an environment; default half the most."),
    ] = None
    observation_tokens: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Mean observation; default half the longest, in all at most half the completion.",
        ),
    ] = None
    environment_seconds: Annotated[
        float, typer.Option(min=0, help="Mean seconds of a call of an environment.")
    ] = 0.0
    longest_environment_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds of a batch's longest call; default the mean."),
    ] = None
    rows: Annotated[
        int | None, typer.Option(min=1, help="Training prompts; default all of data.train_files.")
    ] = None

    def lengths(
        self, context: typer.Context, data: DataConfig, environment: EnvironmentConfig
    ) -> Lengths:
        """Mean lengths; ValueError for one above the longest, or that would be ignored."""
        from rlhf3d.planning.job import mean_lengths

        _check_mean("--prompt-tokens", self.prompt_tokens, data.max_prompt_length)
        _check_mean("--response-tokens", self.response_tokens, data.max_response_length)
        if environment.enabled:
            _check_mean("--turns", self.turns, environment.max_turns)
            longest = environment.max_observation_tokens or data.max_response_length
            _check_mean("--observation-tokens", self.observation_tokens, longest)
        else:
            of_turns = (
                "turns",
                "observation_tokens",
                "environment_seconds",
                "longest_environment_seconds",
            )
            refuse_unused(context, of_turns, "environment.path is not set: there is one turn")
        return mean_lengths(
            data,
            environment,
            self.prompt_tokens,
            self.response_tokens,
            self.turns,
            self.observation_tokens,
            self.environment_seconds,
            self.longest_environment_seconds,
        )


def _check_mean(option: str, mean: float | None, longest: int) -> None:
    if mean is not None and mean > longest:
        raise ValueError(
            f"{option} {mean:g}: a mean above the longest that the configuration allows, {longest}"
        )


@option_groups
def plan(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run; of the model only config.json is read.")
    ],
    overrides: Overrides = None,
    *,
    machine: Machine,
    workload: Workload,
    search: Annotated[
        bool, typer.Option("--search", help="Look for the fastest layout that fits.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --search: write the best as YAML.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 2 where the run does not fit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate a run's memory by rank and phase, and its time, without GPUs or weights.

    Example: rlhf3d plan configs/math.yaml --gpus 16xH200 --search
    """
    from rlhf3d.config.resolve import load_run
    from rlhf3d.planning.search.command import plan_command

    if not search:
        refuse_unused(context, ["write"], "it is for what --search finds; give --search as well")
    if machine.gpus is None:
        refuse_unused(context, ["hardware"], "--gpus names what in it to plan for")
    check_output("--write", write, is_file=True)
    loaded = load_run(config, overrides or [])
    fits = plan_command(
        loaded,
        machine.gpus,
        machine.hardware,
        machine.measured,
        workload.model_config,
        workload.lengths(context, loaded.data, loaded.environment),
        workload.rows,
        search,
        write,
        as_json,
    )
    raise typer.Exit(2 if check and not fits else 0)
