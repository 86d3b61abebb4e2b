"""`rlhf3d samples`, `report`, `watch` and `compare`: look at what a run or an evaluation wrote."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf3d.options import AsJson, option_groups, refuse_unused
from rlhf3d.paths import check_output

if TYPE_CHECKING:
    from rlhf3d.observability.samples import Sample


@dataclass(frozen=True)
class Filters:
    """Which generations are shown; several conditions all hold."""

    wrong: Annotated[bool, typer.Option("--wrong", help="Only answers that are wrong.")] = False
    right: Annotated[bool, typer.Option("--right", help="Only answers that are right.")] = False
    unparsable: Annotated[
        bool, typer.Option("--unparsable", help="Only completions without an answer.")
    ] = False
    failed: Annotated[
        bool, typer.Option("--failed", help="Only those whose scoring or environment failed.")
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

    def keeps(self, sample: Sample) -> bool:
        """Return whether a sample is shown."""
        scored = sample.outcome == "scored"
        text = f"{sample.prompt}\n{sample.transcript}".lower()
        conditions = (
            (self.wrong, scored and sample.score < 1.0),
            (self.right, scored and sample.score >= 1.0),
            (self.unparsable, sample.outcome == "unparsable"),
            (self.failed, sample.outcome not in ("scored", "unparsable")),
            (self.truncated, sample.finish_reason == "length"),
        )
        return self.contains.lower() in text and all(holds for asked, holds in conditions if asked)


@dataclass(frozen=True)
class Tokens:
    """Who wrote which token."""

    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens", help="Show who wrote each token of a trajectory, and both log-probs."
        ),
    ] = False
    number: Annotated[
        int | None, typer.Option(min=0, help="Which trajectory of the step; default the first.")
    ] = None
    worst: Annotated[
        bool, typer.Option("--worst", help="The trajectory with the largest difference.")
    ] = False

    def check(self, context: typer.Context) -> None:
        """Refuse options that would be ignored. Raises ValueError."""
        if not self.tokens:
            refuse_unused(context, ["number", "worst"], "it is for --tokens")
            return
        unused = ["kind", "limit", *(item.name for item in fields(Filters))]
        refuse_unused(context, unused, "--tokens shows one trajectory (--number N or --worst)")
        if self.worst and self.number is not None:
            raise ValueError("of --number and --worst give one: each names a trajectory")


@option_groups
def samples(
    context: typer.Context,
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
    tokens: Tokens,
) -> None:
    """Show generations with their scores, or the tokens of one.

    Example: rlhf3d samples runs/quickstart --step 8 --wrong
    """
    import json

    from rlhf3d.evaluation.browse import load, samples_view
    from rlhf3d.evaluation.tokens import chosen as choose
    from rlhf3d.evaluation.tokens import load_tokens, tokens_view

    filters.check()
    tokens.check(context)
    if tokens.tokens:
        found, trajectories = load_tokens(run, step)
        one = choose(trajectories, tokens.number, tokens.worst)
        tokens_view(f"{run} step {found}", trajectories, one).show(as_json)
        return
    title, generations = load(run, step, kind)
    view = samples_view(title, generations, filters.keeps, limit)
    if not as_json:
        view.show()
        return
    for sample in view.data:
        typer.echo(json.dumps(sample))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs (trainer.output_dir).")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page; default report.html in the run's folder, of several runs in this one."
        ),
    ] = None,
) -> None:
    """Write a page about a run: is it learning, healthy, what limits it, what did it write?

    Several runs are compared. Of one run without --output also report.md and curves.png.

    Example: rlhf3d report runs/quickstart
    """
    check_output("--output", output, is_file=True)
    from rlhf3d.observability.page.collect import names_of
    from rlhf3d.observability.report import make_report
    from rlhf3d.results.run_page import PAGE_FILE, write_page
    from rlhf3d.results.run_setup import find_setup

    runs = list(names_of(runs))
    if output is None and len(runs) == 1:
        typer.echo(write_page(runs, runs[0] / PAGE_FILE))
        typer.echo(make_report(runs[0], find_setup(runs[0])))
        return
    typer.echo(write_page(runs, output or Path(PAGE_FILE)))


def watch(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs (trainer.output_dir).")],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: one that is free.")
    ] = 0,
) -> None:
    """Serve the page of `report` on this machine only, made again with each step; Ctrl-C ends it.

    A run may be without a step yet: the page waits for it.

    Example: rlhf3d watch runs/quickstart
    """
    from rlhf3d.observability.page.collect import names_of
    from rlhf3d.observability.page.serve import PageServer
    from rlhf3d.results.live_page import LivePage

    with PageServer(port, LivePage(list(names_of(runs))).current) as server:
        typer.echo(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            # It has no other end.
            return


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path, typer.Option(help="The picture.")] = Path("compare.png"),
) -> None:
    """Draw the reward, accuracy and length of several runs over each other.

    Example: rlhf3d compare runs/quickstart runs/grpo --output compare.png
    """
    from rlhf3d.observability.curves import draw_comparison
    from rlhf3d.observability.metrics import read_metrics
    from rlhf3d.observability.page.collect import names_of

    check_output("--output", output, is_file=True)
    draw_comparison({name: read_metrics(run) for run, name in names_of(runs).items()}, output)
    typer.echo(output)
