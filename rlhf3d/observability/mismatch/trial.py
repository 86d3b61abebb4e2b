"""Which setting makes engine and trainer part: the same comparison with one thing varied at a time.

Invariant: a setting is named only where the configuration is off and, with that setting varied, it
is not. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf3d.observability.mismatch.causes import Settings
from rlhf3d.observability.mismatch.diagnosis import Diagnosis, within_rounding
from rlhf3d.observability.mismatch.measures import Measures
from rlhf3d.observability.mismatch.pairs import Pairs

Kind = Literal["configured", "again", "whole", "read", "sampled", "raw", "float32"]

TITLES: dict[Kind, str] = {
    "configured": "as configured",
    "again": "after another weight sync",
    "whole": "top_p and top_k off",
    "read": "engine reads the tokens, trainer",
    "sampled": "engine samples, engine reads",
    "raw": "engine samples, engine reads at temperature 1",
    "float32": "model and engine in float32",
}
"""What is compared."""


@dataclass(frozen=True)
class Variation:
    """A comparison of two sides."""

    kind: Kind
    pairs: Pairs
    settings: Settings
    """Under which it was made."""
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both sides are as two roundings of one computation."""
        return within_rounding(Measures(self.pairs, self.settings.limit))


@dataclass(frozen=True)
class Finding:
    """What the variations say."""

    fault: bool
    text: str
    setting: str = ""
    """The setting that is the cause; empty where none is."""


@dataclass(frozen=True)
class _Rule:
    """What follows where some comparisons agree and others do not."""

    agree: tuple[Kind, ...]
    differ: tuple[Kind, ...]
    setting: str
    text: str


_RULES = (
    _Rule(
        ("again",),
        (),
        "weight sync",
        "Both agree after another sync of the same weights: the first one did not arrive "
        "everywhere. rollout.canary_every=1 compares after each.",
    ),
    _Rule(
        ("whole",),
        (),
        "rollout.top_p, rollout.top_k",
        "Both agree with them off: the engine's log-probs are of a part of the vocabulary. Leave "
        "them off, or correct for it (algorithm.rollout_correction).",
    ),
    _Rule(
        ("raw",),
        (),
        "rollout.temperature",
        "The engine's log-probs of what it samples are those at temperature 1: they are from "
        "before the temperature (vLLM's logprobs_mode must be processed_logprobs).",
    ),
    _Rule(
        ("read",),
        ("sampled",),
        "sampling",
        "What the engine computes when it reads the tokens is what the trainer computes, and not "
        "what it gave when it sampled them: look for sampling defaults in the model's "
        "generation_config.json, and at what its log-probs are taken from.",
    ),
    _Rule(
        ("float32",),
        (),
        "model.dtype, rollout.dtype",
        "Both agree in float32: the number format does it, or, in a mixture of experts, tokens "
        "that rounding sends to other experts.",
    ),
    _Rule(
        ("sampled",),
        (),
        "",
        "No variation takes it away, and the engine agrees with itself: both sides compute "
        "something else. The causes below go by its shape.",
    ),
)
"""The surest first."""


def conclude(diagnosis: Diagnosis, variations: Sequence[Variation]) -> Finding:
    """Say which setting it is; `diagnosis`: of the configuration as it is."""
    agrees: dict[Kind, bool] = {}
    for variation in variations:
        # Of several engines that read: all of them.
        agrees[variation.kind] = agrees.get(variation.kind, True) and variation.agrees
    if diagnosis.verdict == "healthy" and agrees.get("whole", True):
        text = "Engine and trainer agree: no setting is at fault."
        if not agrees["configured"]:
            text = "They differ as the configuration asks: with top_p and top_k off they agree."
        return Finding(False, text)
    reads = [variation for variation in variations if variation.kind == "read"]
    if len({variation.agrees for variation in reads}) > 1:
        wrong = ", ".join(variation.note for variation in reads if not variation.agrees)
        text = f"Not every engine has the trainer's weights: {wrong} does not."
        return Finding(True, text, "weight sync")
    for rule in _RULES:
        if all(agrees.get(kind) for kind in rule.agree) and not any(
            agrees.get(kind, True) for kind in rule.differ
        ):
            return Finding(True, rule.text, rule.setting)
    return Finding(True, "No variation takes it away. The causes below go by its shape.")
