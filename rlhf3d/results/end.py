"""What a run leaves its user at its end: report, curves, answers before and after.

Invariant: nothing here makes a complete run a failed one: what goes wrong is reported instead.
Runs in: driver.
"""

from __future__ import annotations

from pathlib import Path

from rlhf3d.observability.console import Console, reported_only
from rlhf3d.observability.report import CURVES_FILE, make_report
from rlhf3d.observability.samples import before_after
from rlhf3d.results.run_page import PAGE_FILE, write_page
from rlhf3d.results.run_setup import find_setup


def show_results(output: Path, console: Console, checkpoint: Path | None) -> None:
    """Show them; `checkpoint`: the last one."""
    lines = _make_report(output, console)
    what = "answers before and after cannot be shown"
    with reported_only(
        console, what, f"the run is complete, `rlhf3d samples {output}` shows answers"
    ):
        before, after = before_after(output)
        if before:
            console.samples(before, after)
    # None with trainer.save_at_end=false and nothing saved before.
    saved = "no checkpoint was saved" if checkpoint is None else f"checkpoint {checkpoint}"
    console.done([*lines, saved])


def show_finished(run: Path) -> int:
    """Show what is there when a finished run's command comes again; exit code 0."""
    with Console() as console:
        _make_report(run, console)
        again = "trainer.resume_mode=never runs it again, in a folder beside it"
        console.done(
            [f"{run} is a finished run of this configuration, so nothing was done; {again}"]
        )
    return 0


def _make_report(output: Path, console: Console) -> list[str]:
    """Lines that say where page, report and curves are."""
    lines = []
    then = f"the run is complete, `rlhf3d report {output}` makes it when that is fixed"
    with reported_only(console, "there is no report", then):
        report = make_report(output, find_setup(output))
        lines = [f"report {report}", f"curves {output / CURVES_FILE}"]
    with reported_only(console, "there is no page", then):
        lines = [f"page {write_page([output], output / PAGE_FILE)}", *lines]
    return lines
