"""What `algorithm.rollout_correction` asks for, read from its texts (`correction` applies it).

Invariant: a text that has no meaning is refused with key, value and fix. No torch: the
configuration's checks use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf3d.algorithms.names import IS_LEVELS, RS_KINDS
from rlhf3d.algorithms.registry import unknown_name

_SECTION = "algorithm.rollout_correction"


@dataclass(frozen=True)
class Bounds:
    """The range of a ratio (k1) or of a divergence (k2, k3) that is trusted."""

    low: float
    high: float


@dataclass(frozen=True)
class Rejection:
    """One criterion of `rollout_rs`."""

    kind: str
    bounds: Bounds


@dataclass(frozen=True)
class CorrectionSettings:
    """Correction of a run with three policies: rollout, old, current."""

    is_level: str | None = None
    """token, sequence, or None for no weights."""
    is_bounds: Bounds = Bounds(0.0, 2.0)
    """Weights are truncated at `high`; with a `low` above 0 those outside become 0."""
    batch_normalize: bool = False
    """Divide the weights by their mean over the batch."""
    rejections: tuple[Rejection, ...] = ()


def correction_settings(
    rollout_is: str | None,
    rollout_is_threshold: float | str,
    batch_normalize: bool,
    rollout_rs: str | None,
    rollout_rs_threshold: float | str | None,
) -> CorrectionSettings:
    """The settings that the texts mean.

    ValueError, with key, value and fix, for a text without a meaning. `rollout_is_threshold` is a
    number C (truncation) or `low_high` (IcePop). `rollout_rs` is one of RS_KINDS, or several with
    commas; `rollout_rs_threshold` one value for all or one each: `low_high` or `high` (then low is
    1/high) of a ratio for k1, the largest divergence for k2 and k3.
    """
    if rollout_is is not None and rollout_is not in IS_LEVELS:
        raise unknown_name(f"{_SECTION}.rollout_is", rollout_is, IS_LEVELS)
    return CorrectionSettings(
        rollout_is,
        _ratio_bounds("rollout_is_threshold", rollout_is_threshold, symmetric=False),
        batch_normalize,
        _rejections(rollout_rs, rollout_rs_threshold),
    )


def _rejections(kinds_text: str | None, threshold: float | str | None) -> tuple[Rejection, ...]:
    if kinds_text is None:
        return ()
    kinds = list(dict.fromkeys(kind.strip() for kind in kinds_text.split(",")))
    key = f"{_SECTION}.rollout_rs_threshold"
    if threshold is None:
        raise ValueError(f"{key} is not set: {_SECTION}.rollout_rs = {kinds_text} needs it")
    texts = [text.strip() for text in str(threshold).split(",")]
    if len(texts) not in (1, len(kinds)):
        raise ValueError(
            f"{key} = {threshold}: {len(texts)} values for {len(kinds)} criteria "
            f"({', '.join(kinds)}); give one, or one each"
        )
    if len(texts) == 1:
        texts *= len(kinds)
    return tuple(_rejection(kind, text) for kind, text in zip(kinds, texts, strict=True))


def _rejection(kind: str, text: str) -> Rejection:
    if kind not in RS_KINDS:
        raise unknown_name(f"{_SECTION}.rollout_rs", kind, RS_KINDS)
    if kind.endswith("k1"):
        return Rejection(kind, _ratio_bounds("rollout_rs_threshold", text, symmetric=True))
    # Before `_range`, which would take it for low_high.
    if "_" in text:
        raise ValueError(
            f"{_SECTION}.rollout_rs_threshold = {text}: {kind} is a divergence and has an upper "
            "bound only; give one number"
        )
    _, high = _range("rollout_rs_threshold", text)
    return Rejection(kind, Bounds(0.0, high))


def _range(key: str, value: float | str) -> tuple[float | None, float]:
    """(low, high) of a text; low is None where the text is one number."""
    try:
        # Split first: float() reads 0.5_2 as 0.52, underscores are allowed in its digits.
        numbers = [float(part) for part in str(value).split("_")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(math.isfinite(x) and x > 0 for x in numbers):
        raise ValueError(
            f"{_SECTION}.{key} = {value}: expected a number above 0, or low_high such as 0.5_2.0"
        )
    low, high = (None, numbers[0]) if len(numbers) == 1 else numbers
    if low is not None and low > high:
        raise ValueError(
            f"{_SECTION}.{key} = {value}: low {low:g} is above high {high:g}; swap them"
        )
    return low, high


def _ratio_bounds(key: str, value: float | str, *, symmetric: bool) -> Bounds:
    """Bounds of a ratio.

    One number is the upper one; the lower one is then 1/high (`symmetric`) or 0.
    """
    low, high = _range(key, value)
    if low is None:
        low = 1.0 / high if symmetric else 0.0
    # YAML reads 0.5_2 as the number 0.52, which arrives here.
    if high < 1 or low > 1:
        raise ValueError(
            f"{_SECTION}.{key} = {value}: engines that agree have ratio 1, which must lie within; "
            "write a range as 0.5_2.0, with both decimal points"
        )
    return Bounds(low, high)
