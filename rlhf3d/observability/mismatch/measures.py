"""What the causes are told apart by: each a question to the pairs, answered with figures.

Invariant: none of them knows a cause or gives advice. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf3d.observability.mismatch.pairs import Array, Pairs
from rlhf3d.observability.mismatch.summary import rank_correlation

CLEARLY = 2.0
"""A token is clearly off from that many limits on; of sound pairs about 1 % are."""
LEAST = 15.0
"""Tokens that are clearly off and missing in a part, before the part counts as sound."""
MISSING = 0.1
"""And at most this share of what it would have if it were like the rest."""
NEIGHBORS = (-2, -1, 1, 2)
CLASSES = 8
"""Of tokens by their log-prob."""


@dataclass(frozen=True)
class Shift:
    """How well each engine's log-prob fits that of a neighbor in training."""

    by: int
    abs_mean: float
    own_abs_mean: float
    """Of the same tokens without a shift."""


@dataclass(frozen=True)
class Line:
    """The difference as a straight line over the log-prob (the mean of both sides)."""

    slope: float
    explained: float
    """Share of the differences' variance."""
    correlation: float
    """Of the two sides' log-probs."""


@dataclass(frozen=True)
class Split:
    """A bound in a property of tokens, up to which they are sound, and beyond it not."""

    bound: float
    score: float
    """1: no token up to it is clearly off."""
    sound_abs_mean: float
    other_abs_mean: float


@dataclass(frozen=True)
class Onset:
    """Rows that are sound up to a token, each up to another one."""

    rows: int
    """That have such a beginning."""
    score: float
    rate: float
    """Share of the tokens after it that are clearly off."""
    places: tuple[int, int]
    """The first and the last place in a response where it begins."""


@dataclass(frozen=True)
class Measures:
    """Of pairs, for a limit of rounding."""

    pairs: Pairs
    limit: float

    @cached_property
    def size(self) -> Array:
        """|Difference| of each token."""
        return np.abs(self.pairs.difference)

    @cached_property
    def off(self) -> Array:
        """Whether each token is clearly off."""
        return self.size > CLEARLY * self.limit

    @property
    def mean(self) -> float:
        """|Difference|, mean over tokens."""
        return float(self.size.mean())

    @property
    def one_sided(self) -> float:
        """1: every difference has the sign of their sum; 0: both signs have the same weight."""
        return float(abs(self.pairs.difference.sum()) / max(self.size.sum(), 1e-12))

    @property
    def kept_mass(self) -> tuple[float, float]:
        """Mean ratio of probabilities trainer/engine, and its standard error.

        Over tokens drawn from the engine's distribution its expectation is the trainer's
        probability of everything that the engine can draw: 1 unless the engine leaves tokens out.
        """
        ratio = np.exp(np.clip(-self.pairs.difference, -20, 20))
        return float(ratio.mean()), float(ratio.std() / np.sqrt(len(ratio)))

    @property
    def line(self) -> Line:
        """See `Line`."""
        pairs, middle = self.pairs, (self.pairs.engine + self.pairs.trainer) / 2
        # The mean of both sides: noise on one side alone would make a slope of its own.
        covariance = np.cov(middle, pairs.difference)
        spread, noise = covariance.diagonal()
        if min(spread, noise) <= 0:
            return Line(0.0, 0.0, 0.0)
        slope = covariance[0, 1] / spread
        sides = np.corrcoef(pairs.engine, pairs.trainer)[0, 1]
        return Line(float(slope), float(slope**2 * spread / noise), float(sides))

    def best_shift(self) -> Shift | None:
        """The neighbor that fits best; None where spans are too short."""
        found = [self._shift(by) for by in NEIGHBORS]
        fitting = [shift for shift in found if shift is not None]
        return min(fitting, key=lambda shift: shift.abs_mean, default=None)

    def _shift(self, by: int) -> Shift | None:
        pairs = self.pairs
        spans = np.stack([pairs.row, pairs.turn, pairs.position - np.arange(len(pairs))])
        here: Array = np.arange(len(pairs) - abs(by)) + max(0, -by)
        # In the same stretch of sampled tokens, with none left out between them.
        here = here[(spans[:, here] == spans[:, here + by]).all(axis=0)]
        if len(here) < LEAST:
            return None
        apart = np.abs(pairs.engine[here] - pairs.trainer[here + by])
        return Shift(by, float(apart.mean()), float(self.size[here].mean()))

    @cached_property
    def _alike(self) -> Array:
        """The class of each token by its log-prob: sure tokens differ little, whatever is wrong."""
        # The larger of both: a token that one side only is sure of is off.
        logprob = np.maximum(self.pairs.engine, self.pairs.trainer)
        edges = np.quantile(logprob, np.linspace(0, 1, CLASSES + 1)[1:-1])
        return np.asarray(np.searchsorted(edges, logprob))

    def _usual(self, values: Array) -> Array:
        """Of each token, the mean of `values` over those of about the same log-prob."""
        means = np.bincount(self._alike, values) / np.maximum(np.bincount(self._alike), 1)
        return np.asarray(means[self._alike])

    def split(self, values: Array) -> Split | None:
        """The largest bound in `values` up to which tokens are sound; None without one."""
        order = np.argsort(values, kind="stable")
        ordered, size = values[order], self.size[order]
        ends = np.flatnonzero(np.diff(ordered)) + 1  # never between equal values
        found = np.cumsum(self.off[order])[ends - 1]
        expected = np.cumsum(self._usual(self.off)[order])[ends - 1]
        sound = np.flatnonzero((expected >= LEAST) & (found <= MISSING * expected))
        if not len(sound):
            return None
        best = sound[-1]
        end = ends[best]
        return Split(
            float(ordered[end - 1]),
            float(1 - found[best] / expected[best]),
            float(size[:end].mean()),
            float(size[end:].mean()),
        )

    def onset(self) -> Onset | None:
        """Rows with a sound beginning; None where it is no longer than chance makes it."""
        heads: list[int] = []
        tails: list[Array] = []
        for off in _by_row(self.pairs.row, self.off):
            first = int(off.argmax())
            if off[first]:
                heads.append(first)
                tails.append(off[first + 1 :])
        after = np.concatenate(tails) if tails else np.array([])
        rate = float(after.mean()) if len(after) >= LEAST else 0.0
        # Beyond the beginning that all rows have: a bound of their own.
        own = sum(heads) - len(heads) * min(heads, default=0)
        # If a row were off from its first token on, this many tokens would be clearly off before
        # the first one that is: the mean of a geometric distribution, which rows add up to.
        missing, chance = own * rate, len(heads) * (1 - rate)
        if missing < LEAST + chance:
            return None
        begun = [head for head in heads if head]
        return Onset(len(begun), 1 - chance / missing, rate, (min(begun), max(begun)))

    def correlation_of_rows(self, values: Array) -> tuple[float, float]:
        """Rank correlation of rows' |difference| with a property of theirs, and what chance makes.

        The difference is over that of tokens of about the same log-prob; chance is 3 standard
        errors, rows with one value counted as one: they may be of one prompt.
        """
        _, first, number = np.unique(self.pairs.row, return_index=True, return_inverse=True)
        usual = np.maximum(np.bincount(number, self._usual(self.size)), 1e-12)
        found = rank_correlation(np.bincount(number, self.size) / usual, values[first])
        return found, float(3 / np.sqrt(max(len(np.unique(values)) - 1, 1)))

    def sound_rows(self) -> Array:
        """Of each token, whether its row has none that is clearly off; False where that may be
        chance.
        """
        _, number = np.unique(self.pairs.row, return_inverse=True)
        sound = np.bincount(number, self.off)[number] == 0
        missing = self.off[~sound].mean() * sound.sum() if not sound.all() else 0.0
        return sound if missing >= LEAST else np.zeros_like(sound)

    def decay(self) -> float:
        """|Difference| of the last third of the places in a response over that of the first third.

        Each over that of tokens of about the same log-prob.
        """
        place, usual = self.pairs.place, self._usual(self.size)
        early, late = place <= np.quantile(place, 1 / 3), place >= np.quantile(place, 2 / 3)
        late_share = self.size[late].sum() / max(usual[late].sum(), 1e-12)
        return float(late_share / max(self.size[early].sum() / usual[early].sum(), 1e-12))

    def on_grid(self, logprobs: Array) -> float:
        """Share of log-probs that are numbers of bfloat16, of those where that is no chance."""
        # Above 0.5 neighbors are 0.004 apart, and files keep five decimals.
        large = logprobs[np.abs(logprobs) > 0.5].astype(np.float32)
        if len(large) < LEAST:
            return 0.0
        mantissa, exponent = np.frexp(large)
        nearest = np.ldexp(np.round(mantissa * 256) / 256, exponent)
        return float(np.mean(np.abs(large - nearest) <= 1.1e-5))


def _by_row(row: Array, values: Array) -> Sequence[Array]:
    """The values of each row, in order."""
    return np.split(values, np.flatnonzero(np.diff(row)) + 1)
