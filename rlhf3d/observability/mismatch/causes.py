"""Why engine and trainer part: a test for each cause, and its evidence.

Invariant: a cause is named with the figures that speak for it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf3d.observability.mismatch.measures import CLEARLY, MISSING, Measures, Split
from rlhf3d.observability.mismatch.rounding import ROUNDING_LIMIT, Precision

LINE_EXPLAINS, LINE_SLOPE, LINE_CORRELATION = 0.4, 0.05, 0.95
"""Of a temperature. Measured on tiny models: 0.56 or more of the variance at temperatures 0.7 to
1.3, correlations of 0.98 between the sides; of other weights at most 0.16 at such correlations."""
ONE_SIDE = 0.9
"""Of truncated sampling, where differences are above 0; of rounding about 0."""
ROWS = 0.4
"""Rank correlation of rows' differences with their padding."""
DECAYED, STEADY = 0.45, 0.95
"""Late over early tokens, where old weights have read the prompt alone, and where they wrote
everything. Measured on tiny models: 0.28 to 0.75, and 0.7 to 1.3; in the middle neither is sure."""
BOUND = 0.6
"""Score from which one bound for all rows is the simpler explanation than one for each."""
FEW = 0.25
"""Share of tokens that is few."""
OUTLIERS = 0.05
"""Share of tokens that is too small to have a shape."""
UNLIKE = 0.9
"""Correlation of the sides' log-probs below which these are no two roundings of one model."""
GRID = 0.9
"""Share of a side's log-probs that are numbers of bfloat16."""

Kind = Literal[
    "not_finite",
    "alignment",
    "sampling",
    "tokenization",
    "position",
    "padding",
    "prefix_cache",
    "stale_weights",
    "routing",
    "precision",
    "wrong_weights",
    "outliers",
]


@dataclass(frozen=True)
class Settings:
    """Of the run, as far as they matter."""

    precision: Precision = "bfloat16"
    """The coarsest number format of the two sides."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    experts: bool = False
    """Whether the model is a mixture of experts."""

    @property
    def limit(self) -> float:
        """Largest mean |difference| that is rounding, nats."""
        return ROUNDING_LIMIT[self.precision]

    @property
    def truncates(self) -> bool:
        """Whether the engine draws from a part of the vocabulary, as configured."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True)
class Cause:
    """One explanation."""

    kind: Kind
    title: str
    score: float
    """How well it explains what is seen, 0 to 1; 0.5 or less is a guess by size alone."""
    evidence: str
    advice: str
    expected: bool = False
    """Whether the configuration asks for it."""


Test = Callable[[Measures, Settings], Cause | None]


def alignment(measures: Measures, _: Settings) -> Cause | None:
    """Each log-prob is a neighbor's."""
    shift = measures.best_shift()
    if shift is None or shift.abs_mean > 0.3 * shift.own_abs_mean:
        return None
    side = "next" if shift.by > 0 else "previous"
    far = "" if abs(shift.by) == 1 else " but one"
    return Cause(
        "alignment",
        "Log-probs stand at the wrong token",
        1 - shift.abs_mean / shift.own_abs_mean,
        f"The engine's log-prob of a token fits the trainer's of the {side} one{far}: mean "
        f"|difference| {shift.abs_mean:.2g} instead of {shift.own_abs_mean:.2g}.",
        "Logits of place i are of token i + 1: look where log-probs are cut to the response.",
    )


def truncated_sampling(measures: Measures, settings: Settings) -> Cause | None:
    """The engine draws from a part of the vocabulary, the trainer counts all of it."""
    mass, error = measures.kept_mass
    wrong_side = float(np.mean(measures.pairs.difference < -CLEARLY * measures.limit))
    if measures.one_sided < ONE_SIDE or wrong_side > 0.01 or mass > 1 - 4 * error:
        return None
    name = "a top_k or top_p"
    if settings.truncates:
        name = f"top_k={settings.top_k}, top_p={settings.top_p:g}"
    largest = float(np.quantile(measures.pairs.difference, 0.99))
    return Cause(
        "sampling",
        "The engine samples from a part of the vocabulary",
        measures.one_sided,
        f"The engine's probability is the higher one for every token (by up to {largest:.2g} nats),"
        f" as with {name}: it draws from {100 * mass:.0f} % of the trainer's probability.",
        "rollout.top_p and rollout.top_k are for algorithm.rollout_correction; else both off. If "
        "they are off, look for defaults in the model's generation_config.json.",
        expected=settings.truncates,
    )


def temperature(measures: Measures, settings: Settings) -> Cause | None:
    """One side divides its logits by something else."""
    line = measures.line
    if (
        line.explained < LINE_EXPLAINS
        or abs(line.slope) < LINE_SLOPE
        or line.correlation < LINE_CORRELATION
    ):
        return None
    sharper = "engine's" if line.slope > 0 else "trainer's"
    factor = (1 + abs(line.slope) / 2) / (1 - abs(line.slope) / 2)
    return Cause(
        "sampling",
        "Both sides use different temperatures",
        line.explained**0.5,
        f"The {sharper} distribution is the sharper one, by about {factor:.2g}: a straight line "
        f"over the log-prob explains {100 * line.explained:.0f} % of the differences.",
        f"rollout.temperature is {settings.temperature:g}: one side divides its logits by another "
        "number. Look for a default in generation_config.json, and whether the engine gives "
        "log-probs from before or after the temperature.",
    )


def position(measures: Measures, _: Settings) -> Cause | None:
    """Sound up to a place in the row."""
    split = measures.split(measures.pairs.position)
    if split is None or _changes_with_training(measures):
        return None
    return Cause(
        "position",
        "It begins at a position",
        split.score * _alike_beyond(measures, split.bound),
        f"Up to position {split.bound:.0f} of a row both agree (mean {split.sound_abs_mean:.2g}), "
        f"beyond it they do not ({split.other_abs_mean:.2g}).",
        "Compare what depends on positions on both sides: RoPE scaling and its original length, a "
        "sliding window, the longest sequence of the engine.",
    )


def _alike_beyond(measures: Measures, bound: float) -> float:
    """1: beyond the bound all rows are off; less where each has a bound of its own."""
    onset = measures.onset()
    if onset is None:
        return 1.0
    beyond = measures.off[measures.pairs.position > bound]
    return float(min(1.0, beyond.mean() / onset.rate))


def tokenization(measures: Measures, settings: Settings) -> Cause | None:
    """Sound up to a token of each row's own."""
    onset = measures.onset()
    if onset is None or _changes_with_training(measures):
        return None
    common = position(measures, settings)
    if common is not None and common.score >= BOUND:
        return None
    first, last = onset.places
    return Cause(
        "tokenization",
        "Both sides read other tokens from some place on",
        onset.score,
        f"{onset.rows} rows are sound up to a token of their own (place {first} to {last} of the "
        f"response), and from there {100 * onset.rate:.0f} % of the tokens are clearly off.",
        "Train on the engine's token ids, never on its text: decode and encode again gives other "
        "tokens, and a chat template may render earlier turns differently.",
    )


def padding(measures: Measures, _: Settings) -> Cause | None:
    """Rows with more padding are further off, or those with next to none are sound."""
    if _changes_with_training(measures):
        return None
    pairs = measures.pairs
    by_prompt, chance = measures.correlation_of_rows(-pairs.prompt_length)
    by_row = measures.correlation_of_rows(-pairs.row_length)[0]
    what, found = max(("prompts", by_prompt), ("rows", by_row), key=lambda each: each[1])
    longest = _sound_prompts(measures)
    evidence = (
        f"The shorter the {what}, which get the most padding, the further off they are (rank "
        f"correlation {found:.2f} over rows)."
    )
    if longest is not None:
        evidence = (
            f"Of all rows those with prompts of {-longest.bound:.0f} tokens or more, which get the "
            f"least padding, are sound: mean {longest.sound_abs_mean:.2g}, others "
            f"{longest.other_abs_mean:.2g}."
        )
    elif found < max(ROWS, chance):
        return None
    return Cause(
        "padding",
        "It depends on a row's padding",
        longest.score if longest is not None else 0.5 + found / 2,
        evidence,
        "Padding must be masked in attention and must not count in positions: compare a batch of "
        "one row with the same row among longer ones.",
    )


def _sound_prompts(measures: Measures) -> Split | None:
    """A length from which prompts have sound rows, and no others have."""
    split = measures.split(-measures.pairs.prompt_length)
    if split is None:
        return None
    shorter = -measures.pairs.prompt_length > split.bound
    others = (measures.sound_rows() & shorter).sum() / shorter.sum()
    return split if others <= MISSING else None


def _changes_with_training(measures: Measures) -> bool:
    """Whether the untrained policy's tokens are sound and later ones are not."""
    return measures.split(measures.pairs.trained) is not None


def stale_weights(measures: Measures, _: Settings) -> Cause | None:
    """Sound before the first update and not after it, everywhere."""
    found = _since_a_version(measures)
    if found is None or found.decayed > 0.75:
        return None
    share = f"{100 * found.sound_rows:.0f} %"
    alone = f"; {share} of the later rows are sound, as of an engine of its own"
    rows = alone if found.sound_rows else ""
    return Cause(
        "stale_weights",
        "The engine has older weights than believed",
        found.score * (1 - found.decayed),
        f"{found.since}, in every part of a response{rows}.",
        "A weight sync did not reach every engine: set rollout.canary_every=1, which compares "
        "after each sync.",
    )


def prefix_cache(measures: Measures, _: Settings) -> Cause | None:
    """The same, and less so the further from the prompt."""
    found = _since_a_version(measures)
    if found is None or found.decayed < 0.25:
        return None
    return Cause(
        "prefix_cache",
        "The prompts were read by older weights",
        found.score * found.decayed,
        f"{found.since}; the last third of a response is off by {100 * found.decay:.0f} % of the "
        f"first, where more of what is read is the prompt.",
        "The prefix cache must be emptied when weights change: rollout.canary_every=1 checks it "
        "after each sync.",
    )


@dataclass(frozen=True)
class _Since:
    """What changed with a version."""

    since: str
    score: float
    sound_rows: float
    decay: float

    @property
    def decayed(self) -> float:
        """0: as much late in a response as early; 1: as if the prompt alone were old."""
        return min(1.0, max(0.0, (STEADY - self.decay) / (STEADY - DECAYED)))


def _since_a_version(measures: Measures) -> _Since | None:
    split = measures.split(measures.pairs.trained)
    if split is None:
        return None
    since = (
        f"Up to policy {split.bound:.0f} both agree (mean {split.sound_abs_mean:.2g}), later they "
        f"do not ({split.other_abs_mean:.2g})"
    )
    later = Measures(measures.pairs.where(measures.pairs.trained > split.bound), measures.limit)
    sound = later.sound_rows()
    decay = Measures(later.pairs.where(~sound), measures.limit).decay()
    return _Since(since, split.score, float(sound.mean()), decay)


def routing(measures: Measures, settings: Settings) -> Cause | None:
    """A few tokens go to other experts."""
    share = float(measures.off.mean())
    if not settings.experts or not 0 < share <= FEW:
        return None
    middle = float(np.median(measures.size))
    if middle > measures.limit:
        return None
    large = float(np.mean(measures.size[measures.off]))
    return Cause(
        "routing",
        "Some tokens are routed to other experts",
        0.9,
        f"{100 * share:.2g} % of the tokens are off by {large:.2g} on average while half of all "
        f"are within {middle:.2g}, and the model has experts.",
        "Rounding turns near ties of the router. Give both sides one dtype, or correct for it "
        "(algorithm.rollout_correction).",
    )


def by_size(measures: Measures, settings: Settings) -> Cause:
    """What is left: everywhere, with no shape; how large it is says what is likelier."""
    line, mean = measures.line, measures.mean
    grids = {"engine": measures.pairs.engine, "trainer": measures.pairs.trainer}
    rounded = [name for name, values in grids.items() if measures.on_grid(values) > GRID]
    if rounded:
        return _precision(measures, rounded)
    share = float(measures.off.mean())
    if share <= OUTLIERS:
        return _outliers(measures, share)
    small = mean <= ROUNDING_LIMIT["bfloat16"] and line.correlation > UNLIKE
    if small and settings.precision == "float32" and _has_first(measures):
        return _precision(measures, rounded)
    if not _has_first(measures):
        return _older_or_other(measures)
    return Cause(
        "wrong_weights",
        "Both sides compute with other weights, or compute something else",
        0.5,
        f"It is everywhere and there from the first policy on: {100 * share:.0f} % of the "
        f"tokens are clearly off, the sides' log-probs correlate with "
        f"{line.correlation:.2f}.",
        "A shard may be in another's place or a tensor may lack: rollout.canary_steps compares "
        "after a sync, `rlhf3d reshard CONFIG --explain` shows the plan. Where both sides have "
        "the same weights, compare RoPE, norms and attention.",
    )


def _precision(measures: Measures, rounded: list[str]) -> Cause:
    evidence = (
        f"It is there from the first policy on, in both directions (mean difference "
        f"{measures.pairs.difference.mean():.1g}), and of bfloat16's size: one side computes in it."
    )
    if rounded:
        evidence = (
            f"The {' and the '.join(rounded)}'s log-probs are numbers of bfloat16: they were "
            "rounded after (or before) the softmax."
        )
    return Cause(
        "precision",
        "One side computes in a coarser number format",
        0.9 if rounded else 0.6,
        evidence,
        "Set model.dtype and rollout.dtype to the same, and compute the softmax in float32.",
    )


def _outliers(measures: Measures, share: float) -> Cause:
    rows = len(np.unique(measures.pairs.row[measures.off]))
    return Cause(
        "outliers",
        "A few tokens are far off",
        0.3,
        f"{100 * share:.2g} % of the tokens, in {rows} rows, are clearly off, too few to show what "
        "they have in common.",
        "Read the worst ones: `rlhf3d samples RUN --tokens --worst`. A larger "
        "trainer.sample_tokens keeps more.",
    )


def _has_first(measures: Measures) -> bool:
    """Whether there are tokens of the policy that no update has changed."""
    return bool((measures.pairs.trained == 0).any())


def _older_or_other(measures: Measures) -> Cause:
    """Without the first policy's tokens: size alone."""
    line = measures.line
    alike = line.correlation > UNLIKE
    kind: Kind = "stale_weights" if alike else "wrong_weights"
    title = "The engine has older weights than believed" if alike else "Both have other weights"
    return Cause(
        kind,
        title,
        0.4,
        f"It is everywhere, in no place in particular, and the sides' log-probs correlate with "
        f"{line.correlation:.2f}; no tokens of the first policy are kept, which would tell more.",
        "Start a new run of a few steps with trainer.sample_tokens above 0: old weights show "
        "from the second step on, wrong ones from the first.",
    )


FAINT_TESTS: tuple[Test, ...] = (truncated_sampling, temperature)
TESTS: tuple[Test, ...] = (
    alignment,
    *FAINT_TESTS,
    stale_weights,
    prefix_cache,
    position,
    tokenization,
    padding,
    routing,
)
