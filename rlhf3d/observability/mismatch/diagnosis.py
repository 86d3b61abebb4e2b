"""The verdict: within rounding, or the causes of what is not, the likeliest first.

Invariant: pairs within rounding have no cause, whatever their shape, but sampling settings, which
look like nothing else. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf3d.observability.mismatch.causes import (
    FAINT_TESTS,
    TESTS,
    Cause,
    Settings,
    Test,
    by_size,
)
from rlhf3d.observability.mismatch.measures import Measures
from rlhf3d.observability.mismatch.pairs import Pairs

TAIL, TAIL_SHARE = 10.0, 0.002
"""Limits, and the share of tokens that may be beyond them: a few, as of a model with experts."""
FAINT, FAINT_TOKENS = 0.1, 50
"""Share of the limit, and tokens, from which sampling settings, which nothing else resembles, are
looked for: rounding has no line and no side."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    verdict: Literal["healthy", "cause", "unknown"]
    text: str
    """In one sentence."""
    causes: tuple[Cause, ...]
    """The likeliest first."""
    judged: int
    """Tokens that were judged: those of the policy being trained."""


def diagnose(pairs: Pairs, settings: Settings) -> Diagnosis:
    """Judge pairs; there is at least one."""
    judged = judged_pairs(pairs)
    measures = Measures(judged, settings.limit)
    count = len(judged)
    by = f"mean |difference| {measures.mean:.2g} nats over {count} tokens"
    rounding = f"rounding of {settings.precision} (up to {settings.limit:g})"
    found = _not_finite(pairs)
    if within_rounding(measures):
        if measures.mean > FAINT * measures.limit and count >= FAINT_TOKENS:
            found += _named(measures, settings, FAINT_TESTS)
        if not found:
            return Diagnosis("healthy", f"Within {rounding}: {by}.", (), count)
    elif judged.age.any():
        text = (
            f"Every token was written by an older policy than the one being trained: {by}, with "
            "what training has changed since. Compare with rollout.max_staleness=0."
        )
        return Diagnosis("cause" if found else "unknown", text, found, count)
    else:
        found += _named(measures, settings, TESTS) or (by_size(measures, settings),)
    if found and found[0].expected:
        text = f"As configured: {by}. {found[0].evidence}"
        return Diagnosis("healthy", text, found[:1], count)
    return Diagnosis("cause", f"Not only {rounding}: {by}.", found, count)


def judged_pairs(pairs: Pairs) -> Pairs:
    """Those of the policy being trained: older ones also differ by what training changed.

    All of them where there are none.
    """
    fresh = pairs.where(pairs.age == 0)
    return fresh if len(fresh) else pairs


def within_rounding(measures: Measures) -> bool:
    """Whether the pairs are as two roundings of one computation."""
    # Rounding grows with the log-prob; that of the surer side, as a fault makes the other large.
    surer = np.maximum(measures.pairs.engine, measures.pairs.trainer)
    beyond = float(np.mean(measures.size > TAIL * measures.limit * np.maximum(1, -surer)))
    # One token of a few hundred is no share.
    return measures.mean <= measures.limit and beyond <= max(TAIL_SHARE, 1.5 / len(measures.pairs))


def _named(measures: Measures, settings: Settings, tests: tuple[Test, ...]) -> tuple[Cause, ...]:
    found = [cause for test in tests if (cause := test(measures, settings)) is not None]
    return tuple(sorted(found, key=lambda cause: -cause.score))


def _not_finite(pairs: Pairs) -> tuple[Cause, ...]:
    if not pairs.not_finite:
        return ()
    cause = Cause(
        "not_finite",
        "Log-probs are not finite",
        1.0,
        f"{pairs.not_finite} sampled tokens have a log-prob that is NaN or infinite on one side.",
        "logs/driver.log names the sequences; look at the weights (`rlhf3d inspect MODEL --deep`) "
        "and lower actor.optim.lr.",
    )
    return (cause,)
