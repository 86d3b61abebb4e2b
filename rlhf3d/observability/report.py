"""The results of a run: `curves.png` and `report.md` in its folder.

Invariant: every number is read from the run's own files, held-out gains carry their standard error,
and a run that stopped half-way gets the report of what it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from rlhf3d.observability.curves import draw_curves
from rlhf3d.observability.metrics import (
    STEP_TIME,
    Points,
    Rows,
    by_measure,
    keys_of,
    phase_seconds,
    phase_totals,
    validation_accuracy,
    validation_reward,
)
from rlhf3d.observability.outcome import read_record
from rlhf3d.observability.page.collect import read_rows
from rlhf3d.observability.page.learning import binomial_standard_error
from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.page.timelines import profiles
from rlhf3d.observability.page.trends import mean_of, values
from rlhf3d.observability.page.verdict import judge
from rlhf3d.observability.samples import before_after, printable

CURVES_FILE = "curves.png"
REPORT_FILE = "report.md"

_TABLE_ROWS = 20


def make_report(run_dir: str | Path, setup: Setup | None = None) -> Path:
    """Write `curves.png` and `report.md` into the run's folder; returns the latter.

    `setup`: how the run is set up, where that is known.

    Raises ValueError for a folder without metrics or before the first finished step.
    """
    rows = read_rows(Path(run_dir))
    folder = Path(run_dir)
    draw_curves(rows, folder / CURVES_FILE)
    minutes, record = sum(values(rows, STEP_TIME)) / 60, read_record(folder)
    of = "" if record is None else f" of {record.total_steps}"
    ended = f"; {record}" if record and record.end else ""
    sections = [
        f"# Run report: {folder.resolve().name}",
        f"Steps {rows[0]['step']} to {rows[-1]['step']}{of}, {minutes:.1f} min{ended}.",
        *_verdict(rows, setup),
        f"![curves]({CURVES_FILE})",
        "## Held-out accuracy",
        _gains(rows),
        *_reward_gains(rows),
        "## Learning curve",
        learning_table(rows),
        "## Seconds per phase",
        _phase_table(rows),
        *_overlap(rows),
        *_profiles(folder),
        "## The same held-out prompts, before and after",
        _sample_table(folder),
    ]
    path = folder / REPORT_FILE
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _verdict(rows: Rows, setup: Setup | None) -> list[str]:
    """The answers and warnings that the page has too."""
    verdict = judge(rows, setup)
    lines = [f"* {question} **{found.title}.** {found.text}" for question, found in verdict.answers]
    lines += [
        f"* {found.level}: **{found.title}.** {found.text} {found.advice}".rstrip()
        for found in verdict.checks
        if found.level in ("bad", "watch")
    ]
    return ["## Verdict", "\n".join(_cell(line, len(line)) for line in lines)]


def _gains(rows: Rows) -> str:
    found = by_measure(rows, validation_accuracy)
    if not found and any(validation_reward(row) for row in rows):
        return "Only a reward model scored: nothing is right or wrong."
    if not found:
        return "The run has not validated."
    body = [_gain(*key, measured) for key, measured in found.items()]
    table = _table(["data source", "measure", "prompts", "start", "end", "gain, points"], body)
    note = (
        "± is one binomial standard error over prompts; that of the gain takes start and end as "
        "independent, so it is on the safe side when both answer the same prompts."
    )
    return f"{table}\n\n{note}"


def _gain(source: str, measure: str, measured: Points) -> list[str]:
    """One row: the first and the last accuracy, each with its error."""
    (first, start), (last, end) = measured[0], measured[-1]
    prompts = last.get(f"val-aux/{source}/num_prompts")
    cells = [_cell(source), _cell(measure), f"{prompts:.0f}" if prompts else "not recorded"]
    cells.append(f"{_percent(start, prompts)} (step {first['step']})")
    if len(measured) == 1:
        return [*cells, "–", "–"]
    gain = f"{100 * (end - start):+.1f}"
    if prompts:
        errors = [binomial_standard_error(accuracy, prompts) for accuracy in (start, end)]
        # Errors of independent measurements add up as squares.
        gain += f" ± {100 * math.hypot(*errors):.1f}"
    return [*cells, f"{_percent(end, prompts)} (step {last['step']})", gain]


def _reward_gains(rows: Rows) -> list[str]:
    """A section on the reward model's held-out score, where there is a reward model."""
    found = by_measure(rows, validation_reward)
    body = [_reward_gain(*key, measured) for key, measured in found.items()]
    if not body:
        return []
    table = _table(["data source", "measure", "start", "end", "gain"], body)
    note = (
        "± is one standard error over prompts; that of the gain takes start and end as independent."
    )
    return ["## Held-out score of the reward model", f"{table}\n\n{note}"]


def _reward_gain(source: str, measure: str, measured: Points) -> list[str]:
    (first, start), (last, end) = measured[0], measured[-1]
    name = f"val-aux/{source}/reward_model/{measure}/se"
    errors = [row.get(name, 0.0) for row in (first, last)]
    cells = [_cell(source), _cell(measure)]
    cells.append(f"{start:.3f} ± {errors[0]:.3f} (step {first['step']})")
    if len(measured) == 1:
        return [*cells, "–", "–"]
    gain = f"{end - start:+.3f} ± {math.hypot(*errors):.3f}"
    return [*cells, f"{end:.3f} ± {errors[1]:.3f} (step {last['step']})", gain]


def learning_table(rows: Rows) -> str:
    """Return, as Markdown, step, reward, length, held-out accuracies and seconds per phase.

    A row stands where the run validated (else at every twentieth or so of the run) and at the end;
    reward, length and seconds are means over the steps since the row above, accuracies those of the
    row's own step.
    """
    phases = keys_of(phase_seconds(row) for row in rows)
    accuracies = keys_of(validation_accuracy(row) for row in rows)
    judgments = keys_of(validation_reward(row) for row in rows)
    heading = ["step", "reward", "length, tokens"]
    heading += [_cell(" ".join(key)) for key in accuracies]
    heading += [_cell(f"{' '.join(key)}, reward model") for key in judgments]
    heading += [f"{phase}, s" for phase in phases]
    body = []
    for span in _spans(rows):
        last = span[-1]
        accuracy, judgment = validation_accuracy(last), validation_reward(last)
        cells = [str(last["step"]), _mean(span, "critic/score/mean", ".3f")]
        cells.append(_mean(span, "response_length/mean", ".0f"))
        cells += [f"{accuracy[key]:.1%}" if key in accuracy else "–" for key in accuracies]
        cells += [f"{judgment[key]:.3f}" if key in judgment else "–" for key in judgments]
        cells += [_mean(span, f"timing_s/{phase}", ".1f") for phase in phases]
        body.append(cells)
    return _table(heading, body)


def _spans(rows: Rows) -> list[Rows]:
    """Cut the rows so that each span ends where the learning table has a row."""
    validated = [
        i for i, row in enumerate(rows) if validation_accuracy(row) or validation_reward(row)
    ]
    stride = math.ceil(len(rows) / _TABLE_ROWS)
    # With at least three validations each has a row, and there are none between.
    ends = validated if len(validated) > 2 else [*validated, *range(0, len(rows), stride)]
    cuts = [0, *(end + 1 for end in sorted({*ends, len(rows) - 1}))]
    return [rows[start:stop] for start, stop in pairwise(cuts)]


def _phase_table(rows: Rows) -> str:
    totals = phase_totals(rows)
    everything = totals.total()
    if not everything:
        return "The run has no timings."
    body = []
    for phase, total in totals.most_common():
        times = values(rows, f"timing_s/{phase}")
        means = [f"{fmean(times):.1f}", str(len(times))]
        body.append([phase, *means, f"{total:.0f}", f"{total / everything:.0%}"])
    return _table(["phase", "mean, s", "times", "total, s", "share"], body)


def _overlap(rows: Rows) -> list[str]:
    """What of the generation training hid, of runs that generate ahead."""
    if not values(rows, "async/overlap_share"):
        return []
    share = _mean(rows, "async/overlap_share", ".0%")
    waited = [_mean(rows, f"async/{who}_waited_s", ".1f") for who in ("trainer", "engines")]
    return [
        f"Batches are generated beside the training, which hid {share} of it: in a step the "
        f"trainer waited {waited[0]} s for samples, and the engines {waited[1]} s for the trainer."
    ]


def _profiles(folder: Path) -> list[str]:
    """Where profiled steps lost time."""
    found = profiles(folder)
    lines = []
    for one in found:
        lines += [f"* {_cell(text, len(text))}" for text in (*one.words, one.note)]
    return ["## Profiled steps", "\n".join(lines)] if found else []


def _sample_table(folder: Path) -> str:
    before, after = before_after(folder)
    if not before:
        return "The run has not written held-out answers twice."
    body = []
    for old, new in zip(before, after, strict=True):
        answers = [f"[{sample.mark}] {_cell(sample.transcript)}" for sample in (old, new)]
        body.append([_cell(old.prompt), _cell(old.ground_truth), *answers])
    note = (
        "The first prompts of the held-out set, not chosen by result; [score] in front of the "
        "answer."
    )
    return _table(["prompt", "answer", "before", "after"], body) + "\n\n" + note


def _mean(rows: Rows, name: str, spec: str) -> str:
    mean = mean_of(rows, name)
    return "–" if mean is None else f"{mean:{spec}}"


def _percent(accuracy: float, prompts: float | None) -> str:
    if not prompts:
        return f"{accuracy:.1%}"
    return f"{100 * accuracy:.1f} ± {100 * binomial_standard_error(accuracy, prompts):.1f} %"


def _cell(text: str, limit: int = 400) -> str:
    """Model text inside a markdown table: one line, nothing that reads as a cell border or HTML."""
    return printable(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
