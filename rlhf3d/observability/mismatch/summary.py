"""How far engine and trainer part, in figures: over all tokens, and by what tokens have in common.

Invariant: every token is in one line of each table. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf3d.observability.mismatch.pairs import Array, Pairs

WORST = 8
"""Tokens that are shown by themselves."""
CONTEXT = 6
"""Tokens before a worst one that are shown with it."""
BUCKETS = 5
"""Lines of a table, of as many tokens each as ties allow."""


@dataclass(frozen=True)
class Figures:
    """Over some tokens; in nats where nothing else is said."""

    tokens: int
    abs_mean: float
    mean: float
    """Of engine − trainer: above 0 where tokens are likelier for the engine."""
    abs_p50: float
    abs_p99: float
    abs_max: float
    kl_k3: float
    """Estimate of KL(engine, trainer) per token."""
    prob_abs_mean: float
    """|Difference of the probabilities|."""


@dataclass(frozen=True)
class Line:
    """Figures of the tokens with a property in some range."""

    label: str
    figures: Figures


@dataclass(frozen=True)
class WorstToken:
    """A token on which both part most."""

    step: int
    trajectory: int
    position: int
    before: str
    """The text before it."""
    text: str
    engine: float
    trainer: float


@dataclass(frozen=True)
class Summary:
    """Everything that is measured."""

    all: Figures
    tables: dict[str, list[Line]]
    """By property of tokens."""
    worst: list[WorstToken]


def summarize(pairs: Pairs, of_all_ages: Pairs) -> Summary:
    """Measure the pairs that are judged; there is at least one."""
    properties = {
        "position in the row": pairs.position,
        "place in the response": pairs.place,
        "length of the prompt": pairs.prompt_length,
        "length of the row": pairs.row_length,
        "trainer's |log-prob|": -pairs.trainer,
        "policy trained": pairs.trained,
    }
    tables = {name: _by(pairs, values) for name, values in properties.items()}
    tables["age in versions"] = _by(of_all_ages, of_all_ages.age)
    return Summary(figures(pairs), tables, worst_tokens(pairs))


def figures(pairs: Pairs) -> Figures:
    """Of all of these tokens."""
    difference = pairs.difference
    size = np.abs(difference)
    # Clamped as in training, where a ratio of e^20 is as good as any above.
    ratio = np.clip(-difference, -20, 20)
    return Figures(
        len(pairs),
        float(size.mean()),
        float(difference.mean()),
        float(np.quantile(size, 0.5)),
        float(np.quantile(size, 0.99)),
        float(size.max()),
        float((np.exp(ratio) - 1 - ratio).mean()),
        float(np.abs(np.exp(pairs.engine) - np.exp(pairs.trainer)).mean()),
    )


def worst_tokens(pairs: Pairs) -> list[WorstToken]:
    """Those with the largest differences, the largest first."""
    order = np.argsort(-np.abs(pairs.difference), kind="stable")[:WORST]
    found = []
    for index in order.tolist() if pairs.texts else ():
        row = pairs.texts[pairs.row[index]]
        position = int(pairs.position[index])
        before = "".join(row.texts[max(0, position - CONTEXT) : position])
        logprobs = float(pairs.engine[index]), float(pairs.trainer[index])
        text = row.texts[position]
        found.append(WorstToken(row.step, row.trajectory, position, before, text, *logprobs))
    return found


def _by(pairs: Pairs, values: Array) -> list[Line]:
    """A line for each value where they are few, else for ranges of about as many tokens."""
    known = np.unique(values)
    if len(known) <= BUCKETS:
        return [Line(_number(value), figures(pairs.where(values == value))) for value in known]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BUCKETS + 1)[1:-1], method="lower"))
    bucket = np.searchsorted(edges, values)
    lines = []
    for number in np.unique(bucket):
        inside = bucket == number
        low, high = values[inside].min(), values[inside].max()
        label = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
        lines.append(Line(label, figures(pairs.where(inside))))
    return lines


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, np.floating) else str(int(value))


def rank_correlation(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Spearman's; 0 where one does not vary."""
    ranks = np.stack([_ranks(np.asarray(x)), _ranks(np.asarray(y))])
    if len(ranks[0]) < 2 or not ranks.std(axis=1).all():
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Array) -> Array:
    """Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2)[inverse]).astype(float)
