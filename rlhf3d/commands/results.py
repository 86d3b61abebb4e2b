"""`rlhf3d samples`, `report` and `compare`: look at what a run or an evaluation wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf3d.options import AsJson, option_groups
from rlhf3d.paths import check_output


@dataclass(frozen=True)
class Filters:
    """Which generations are shown."""

    wrong: Annotated[bool, typer.Option("--wrong", help="Only answers that are wrong.")] = False
    right: Annotated[bool, typer.Option("--right", help="Only answers that are right.")] = False
    unparsable: Annotated[
        bool, typer.Option("--unparsable", help="Only completions without an answer.")
    ] = False
    failed: Annotated[
        bool, typer.Option("--failed", help="Only those whose scoring failed or timed out.")
    ] = False
    truncated: Annotated[
        bool, typer.Option("--truncated", help="Only those cut off at the limit.")
    ] = False
    contains: Annotated[
        str, typer.Option(help="Only those with this text in prompt or completion.")
    ] = ""

    def check(self) -> None:
        """Raise ValueError where no generation can be all that is asked for."""
        if sum((self.right, self.wrong, self.unparsable, self.failed)) > 1:
            raise ValueError(
                "of --right, --wrong, --unparsable and --failed give one: no answer is two of them"
            )


@option_groups
def samples(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run (trainer.output_dir) or of an evaluation.")
    ],
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the run; default the last.")
    ] = None,
    kind: Annotated[
        Literal["train", "greedy", "sampled"] | None,
        typer.Option(help="Default train, of an evaluation all."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most N.")] = 10,
    as_json: AsJson = False,
    *,
    filters: Filters,
) -> None:
    """Show generations with their scores."""
    import json
    from dataclasses import asdict

    from rlhf3d.evaluation.browse import Filter, load, samples_view

    filters.check()
    title, generations = load(run, step, kind)
    chosen = Filter(**asdict(filters))
    view = samples_view(title, generations, chosen, limit)
    if not as_json:
        view.show()
        return
    for sample in view.data:
        typer.echo(json.dumps(sample))


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run (trainer.output_dir).")],
) -> None:
    """Write a run's report: curves, phases, samples before and after."""
    from rlhf3d.observability.report import make_report

    typer.echo(make_report(run))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path, typer.Option(help="The picture.")] = Path("compare.png"),
) -> None:
    """Draw the reward, accuracy and length of several runs over each other."""
    from rlhf3d.observability.curves import draw_comparison
    from rlhf3d.observability.metrics import read_metrics

    check_output("--output", output, is_file=True)
    # By resolved path: a run given twice is drawn once.
    names = {run.resolve(): run.resolve().name for run in runs}
    if len(set(names.values())) < len(names):
        # Runs of the same name: tell them apart by their complete paths.
        names = {run: str(run) for run in names}
    draw_comparison({name: read_metrics(run) for run, name in names.items()}, output)
    typer.echo(output)
