"""`rlhf3d samples --tokens`: who wrote which token of a trajectory, with both log-probs.

Invariant: every token of the trajectory is shown once, in order; without colors nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from rich.table import Table
from rich.text import Text

from rlhf3d.evaluation.browse import clean
from rlhf3d.observability.tables import Row, View, table
from rlhf3d.observability.tokens import (
    TokenSpan,
    TrajectoryTokens,
    read_tokens,
    token_steps,
    tokens_path,
)
from rlhf3d.rollout.api import token_versions

_COLORS = {"prompt": "cyan", "sampled": "green", "template": "magenta", "environment": "blue"}
_MEANINGS = {
    "prompt": "the prompt",
    "sampled": "the policy, trained on",
    "template": "the chat template, between turns",
    "environment": "the environment or a tool",
}
_NOTABLE, _LARGE = math.log(1.1), math.log(2.0)
"""Differences that are marked, nats: the probabilities differ by a tenth, by a factor of two."""
_MARKS = {"yellow": "!", "bold red": "!!"}


def load_tokens(folder: Path, step: int | None) -> tuple[int, list[TrajectoryTokens]]:
    """A run's step (None: the last that has any) and its trajectories; ValueError without."""
    steps = token_steps(folder)
    if not steps:
        raise ValueError(
            f"{folder} holds no tokens: a run keeps those of the first trainer.sample_tokens "
            "trajectories of each step; validation and `rlhf3d evaluate` keep none"
        )
    if step is not None and step not in steps:
        raise ValueError(
            f"--step {step}: tokens are there for {len(steps)} steps, {steps[0]} to {steps[-1]}"
        )
    step = steps[-1] if step is None else step
    return step, read_tokens(tokens_path(folder, step))


def chosen(
    trajectories: Sequence[TrajectoryTokens], number: int | None, worst: bool
) -> TrajectoryTokens:
    """The one with that number, the one with the largest difference, or the first."""
    if worst:
        return max(trajectories, key=lambda one: one.largest_difference)
    if number is None:
        return trajectories[0]
    if number >= len(trajectories):
        raise ValueError(
            f"--number {number}: tokens are kept of trajectories 0 to {len(trajectories) - 1} "
            "of this step; trainer.sample_tokens keeps more"
        )
    return trajectories[number]


def tokens_view(
    title: str, trajectories: Sequence[TrajectoryTokens], one: TrajectoryTokens
) -> View:
    """All of the step in a table, and the tokens of one; for programs that one."""
    overview = [_overview(each) for each in trajectories]
    parts: list[Text | Table] = [table(overview, title=title, digits=4), _legend(), Text("")]
    position = 0
    for number, row in enumerate(one.rows):
        parts.append(_row_heading(one, number))
        for span in row:
            parts += [_heading(span, one.trained_version), _text(span)]
    rows: list[Row] = []
    for span in one.spans:
        # A prompt is long, and its tokens have nothing to compare.
        if span.author != "prompt":
            rows += _token_rows(span, position)
            rows.append({})
        position += len(span.token_ids)
    if rows:
        parts.append(table(rows[:-1], title=f"Tokens of trajectory {one.number}", digits=5))
    return View(parts, asdict(one))


def _overview(one: TrajectoryTokens) -> Row:
    differences = one.differences
    mean = fmean(differences) if differences else None
    return {
        "trajectory": one.number,
        "group": one.group,
        "data source": one.data_source,
        "outcome": one.outcome,
        "score": float(one.score),
        "end": one.finish_reason,
        "rows": len(one.rows),
        "turns": sum(span.author == "sampled" for span in one.spans),
        **{author: one.tokens_of(author) for author in _COLORS},
        "mean |diff|": mean,
        "max |diff|": max(differences) if differences else None,
    }


def _legend() -> Text:
    legend = Text("Written by: ")
    for author, color in _COLORS.items():
        legend.append(f"{author} ", style=color).append(f"({_MEANINGS[author]})  ")
    legend.append("\n|diff|: engine's log-prob against Megatron's, nats (of a token of an older ")
    legend.append("policy also what training has changed since); ")
    legend.append("!", style="yellow").append(" the probabilities differ by a tenth, ")
    return legend.append("!!", style="bold red").append(" by a factor of two")


def _row_heading(one: TrajectoryTokens, number: int) -> Text:
    if number == 0:
        return Text(f"Trajectory {one.number}", style="bold")
    again = "the template did not keep what was written before; the conversation begins again"
    return Text(f"Row {number + 1} of {len(one.rows)}: {again}", style="bold")


def _heading(span: TokenSpan, trained: int | None) -> Text:
    """`trained`: the policy that the step trained."""
    words = [f"── {span.author}"]
    if span.versions:
        policies = [str(version) for _, version in span.versions]
        words.append(f"by policy {', '.join(policies)}")
        if trained is not None and any(version != trained for _, version in span.versions):
            words.append(f"(policy {trained} is trained)")
    words.append(f"· {len(span.token_ids)} tokens")
    if span.reward:
        words.append(f"· reward {span.reward:g}")
    known = [difference for difference in span.differences if difference is not None]
    if known:
        words.append(f"· |diff| mean {fmean(known):.4f}, max {max(known):.4f}")
    return Text(" ".join(words), style=_COLORS[span.author])


def _text(span: TokenSpan) -> Text:
    """Its text, with the tokens marked whose log-probs differ much."""
    text = Text()
    for piece, difference in zip(span.texts, span.differences, strict=True):
        style = _mark(difference) or _COLORS[span.author]
        text.append(clean(piece), style=style)
    return text


def _token_rows(span: TokenSpan, start: int) -> list[Row]:
    """A table's row for each token; `start`: tokens before the span."""
    sampled = span.author == "sampled"
    color = _COLORS[span.author]
    authors = [span.author] * len(span.token_ids)
    if sampled:
        written = token_versions(span.versions, len(span.token_ids))
        authors = [f"policy {version}" for version in written]
    nothing = [None] * len(span.token_ids)
    engine = span.rollout_logprobs if sampled else nothing
    trained = nothing if span.old_logprobs is None else span.old_logprobs
    columns = zip(
        authors, span.token_ids, span.texts, engine, trained, span.differences, strict=True
    )
    rows: list[Row] = []
    for place, (author, token, piece, own, old, difference) in enumerate(columns, start):
        mark = _mark(difference)
        rows.append(
            {
                "position": place,
                "written by": Text(author, style=color),
                "id": token,
                "text": Text(_quoted(piece), style=mark or color),
                "engine": own,
                "Megatron": old,
                "|diff|": difference,
                "": Text(_MARKS.get(mark, ""), style=mark),
            }
        )
    return rows


def _quoted(piece: str) -> str:
    """So that spaces and line breaks are seen."""
    return repr(piece) if piece else "(begins a character)"


def _mark(difference: float | None) -> str:
    """The style of a token whose log-probs differ by so much; empty where that is little."""
    if difference is None or difference < _NOTABLE:
        return ""
    return "bold red" if difference >= _LARGE else "yellow"
