"""Tokens of a page: who wrote each, and how far engine and trainer part on it.

Invariant: the worst token named is the worst of all that were read, and it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rlhf3d.observability.tokens import TokenSpan, TrajectoryTokens, read_steps

SHOWN_LAST = 6
"""Trajectories of the last step that are shown, besides that with the worst token."""
TOKENS = 1500
"""Tokens of a trajectory that are shown: around its worst one."""


class Token(NamedTuple):
    """One token: in a page's data a list, as its keys would be most of the page."""

    text: str
    id: int
    author: str
    version: int | None
    engine: float | None
    trainer: float | None
    difference: float | None
    """|engine − trainer|, nats; None where one of the two is not there."""


@dataclass(frozen=True)
class Shown:
    """A trajectory."""

    step: int
    number: int
    """Its place among the step's samples."""
    score: float
    outcome: str
    finish_reason: str
    trained_version: int | None
    tokens: Sequence[Token]
    skipped_before: int
    skipped_after: int
    """Tokens that are not shown."""
    worst: int | None
    """The place of its worst token in `tokens`."""


def trajectories(run: Path) -> list[Shown]:
    """That with the worst token first, then the first of the last step."""
    looked_at = read_steps(run)
    if not looked_at:
        return []
    pairs: list[tuple[int, TrajectoryTokens]] = []
    for step, found in looked_at:
        pairs += [(step, one) for one in found]
    worst = max(pairs, key=lambda pair: pair[1].largest_difference, default=None)
    shown = [pair for pair in pairs if pair[0] == looked_at[-1][0]][:SHOWN_LAST]
    if worst is not None and worst[1].largest_difference >= 0:
        shown = [worst, *(pair for pair in shown if pair is not worst)]
    return [_shown(step, one) for step, one in shown]


def _shown(step: int, one: TrajectoryTokens) -> Shown:
    tokens: list[Token] = []
    for span in one.spans:
        tokens += _tokens(span)
    differences = [-1.0 if token.difference is None else token.difference for token in tokens]
    worst = max(range(len(tokens)), key=lambda place: differences[place], default=None)
    if worst is not None and differences[worst] < 0:
        worst = None
    start = 0 if worst is None else max(0, min(worst - TOKENS // 2, len(tokens) - TOKENS))
    part = tokens[start : start + TOKENS]
    return Shown(
        step,
        one.number,
        float(one.score),
        one.outcome,
        one.finish_reason,
        one.trained_version,
        part,
        start,
        len(tokens) - start - len(part),
        None if worst is None else worst - start,
    )


def _tokens(span: TokenSpan) -> list[Token]:
    count = len(span.token_ids)
    nothing: Sequence[float | None] = [None] * count
    engine = span.rollout_logprobs or nothing
    trainer = span.old_logprobs or nothing
    columns = zip(
        span.texts, span.token_ids, _versions(span), engine, trainer, span.differences, strict=True
    )
    return [
        Token(text, int(token), span.author, version, own, other, gap)
        for text, token, version, own, other, gap in columns
    ]


def _versions(span: TokenSpan) -> list[int | None]:
    """Of each token the policy that wrote it: stretches begin at their first token."""
    found: list[int | None] = [None] * len(span.token_ids)
    for first, version in span.versions:
        found[first:] = [version] * (len(found) - first)
    return found
