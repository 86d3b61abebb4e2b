"""Rollout correction: weights, rejection and diagnostics by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf3d.algorithms.aggregation import aggregate, loss_norm
from rlhf3d.algorithms.correction import (
    effective_sample_size,
    importance_weights,
    mismatch_metrics,
    rejection_mask,
)
from rlhf3d.algorithms.correction_settings import (
    Bounds,
    CorrectionSettings,
    Rejection,
    correction_settings,
)
from rlhf3d.algorithms.names import RS_KINDS

MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def logprobs(ratios: list[list[float]]) -> tuple[Tensor, Tensor]:
    """(old, rollout) whose token ratios are these; the padding is poison."""
    rollout = torch.where(MASK.bool(), torch.tensor(-1.0), math.nan)
    return rollout + torch.tensor(ratios).log(), rollout


RATIOS = [[4.0, 0.5, 1.0], [0.25, 1.0, 1.0], [1.0, 1.0, 1.0]]


def test_token_weights_are_truncated() -> None:
    """Ratios 4, ½, ¼ become weights 3, ½, ¼; the statistics are verl's: the mean is that of the
    ratios, the deviation and the sample size are those of 3, ½, ⅓, the ratios clamped to [1/3, 3].
    """
    old, rollout = logprobs(RATIOS)
    weights, metrics = importance_weights(
        old, rollout, MASK, CorrectionSettings("token", Bounds(0, 3))
    )
    assert torch.allclose(weights, torch.tensor([[3.0, 0.5, 0], [0.25, 0, 0], [0, 0, 0]]))
    clamped = torch.tensor([3.0, 1 / 2, 1 / 3])
    assert metrics == {
        "rollout_is_mean": pytest.approx(19 / 12),
        "rollout_is_std": pytest.approx(clamped.std(unbiased=False).item()),
        "rollout_is_max": pytest.approx(4),
        "rollout_is_min": pytest.approx(0.25),
        "rollout_is_ratio_fraction_high": pytest.approx(1 / 3),
        "rollout_is_ratio_fraction_low": pytest.approx(1 / 3),
        "rollout_is_eff_sample_size": pytest.approx((23 / 6) ** 2 / (3 * (9 + 1 / 4 + 1 / 9))),
    }


def test_sequence_weights_are_products() -> None:
    """4 · ½ = 2 truncated at 1.5, and ¼; the empty sequence does not count. The mean is over the
    three tokens, 2, 2 and ¼, the deviation over 1.5, 1.5 and 2/3, and the shares over the two
    sequences.
    """
    old, rollout = logprobs(RATIOS)
    weights, metrics = importance_weights(
        old, rollout, MASK, CorrectionSettings("sequence", Bounds(0, 1.5))
    )
    assert torch.allclose(weights, torch.tensor([[1.5, 1.5, 0], [0.25, 0, 0], [0, 0, 0]]))
    assert metrics["rollout_is_mean"] == pytest.approx(17 / 12)
    assert metrics["rollout_is_std"] == pytest.approx((1.5 - 2 / 3) * 2**0.5 / 3)
    assert (
        metrics["rollout_is_ratio_fraction_high"] == metrics["rollout_is_ratio_fraction_low"] == 0.5
    )


def test_icepop_masks_outside_its_range() -> None:
    old, rollout = logprobs(RATIOS)
    weights, metrics = importance_weights(
        old, rollout, MASK, CorrectionSettings("token", Bounds(0.4, 3))
    )
    assert torch.allclose(weights, torch.tensor([[0.0, 0.5, 0], [0, 0, 0], [0, 0, 0]]))
    assert metrics["rollout_is_ratio_fraction_high"] == pytest.approx(1 / 3)
    assert metrics["rollout_is_ratio_fraction_low"] == pytest.approx(1 / 3)
    # of 3, 0.5 and 0.4: the ratios clamped to the range
    assert metrics["rollout_is_eff_sample_size"] == pytest.approx(3.9**2 / (3 * (9 + 0.25 + 0.16)))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_batch_normalize_makes_the_mean_one(level: str) -> None:
    old, rollout = logprobs(RATIOS)
    plain, _ = importance_weights(old, rollout, MASK, CorrectionSettings(level, Bounds(0, 2)))
    weights, metrics = importance_weights(
        old, rollout, MASK, CorrectionSettings(level, Bounds(0, 2), True)
    )
    assert torch.allclose(weights * metrics["rollout_is_batch_norm_factor"], plain)
    of_level = weights[MASK.bool()] if level == "token" else weights[:2, 0]
    assert of_level.mean().item() == pytest.approx(1)


def test_extreme_ratios_stay_finite() -> None:
    rollout = torch.tensor([[-500.0, 0.0]])
    weights, metrics = importance_weights(
        -500 - rollout, rollout, torch.ones(1, 2), CorrectionSettings("token", Bounds(0, 2))
    )
    assert weights.tolist() == [[2.0, pytest.approx(math.exp(-20))]]
    assert all(math.isfinite(value) for value in metrics.values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.floats(1, 5))
def test_weights_never_exceed_the_threshold(logs: list[float], threshold: float) -> None:
    old = torch.tensor([logs], dtype=torch.float64)
    mask = torch.ones_like(old)
    for level in ("token", "sequence"):
        weights, metrics = importance_weights(
            old, torch.zeros_like(old), mask, CorrectionSettings(level, Bounds(0, threshold))
        )
        assert weights.max() <= threshold
        assert 0 < metrics["rollout_is_eff_sample_size"] <= 1 + 1e-12
    same, metrics = importance_weights(
        old, old, mask, CorrectionSettings("token", Bounds(0, threshold))
    )
    assert torch.equal(same, mask) and metrics["rollout_is_eff_sample_size"] == 1


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.tensor([3.0, 3.0])) == 1
    assert effective_sample_size(torch.tensor([5.0, 0.0, 0.0, 0.0])) == 0.25
    assert effective_sample_size(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 20)


@pytest.mark.parametrize(
    ("kind", "bounds", "kept"),
    [
        ("token_k1", Bounds(0.3, 3), [[0, 1, 0], [0, 0, 0]]),
        ("token_k2", Bounds(0, 0.9), [[0, 1, 0], [0, 0, 0]]),  # ½ln²4 = 0.961, ½ln²2 = 0.240
        (
            "token_k3",
            Bounds(0, 0.7),
            [[0, 1, 0], [1, 0, 0]],
        ),  # 3 - ln 4, -½ + ln 2, -¾ + ln 4 = 0.636
        ("seq_sum_k1", Bounds(0.5, 3), [[1, 1, 0], [0, 0, 0]]),  # 4 · ½ = 2, ¼
        ("seq_sum_k2", Bounds(0, 1.1), [[0, 0, 0], [1, 0, 0]]),  # 0.961 + 0.240, 0.961
        ("seq_mean_k1", Bounds(0.5, 1.5), [[1, 1, 0], [0, 0, 0]]),  # sqrt 2, ¼
        ("seq_mean_k2", Bounds(0, 0.7), [[1, 1, 0], [0, 0, 0]]),  # 0.600, 0.961
        ("seq_max_k3", Bounds(0, 1), [[0, 0, 0], [1, 0, 0]]),  # 3 - ln 4 = 1.614, 0.636
    ],
)
def test_rejection_by_hand(kind: str, bounds: Bounds, kept: list[list[int]]) -> None:
    old, rollout = logprobs(RATIOS)
    mask, metrics = rejection_mask(old, rollout, MASK, (Rejection(kind, bounds),))
    assert mask.tolist() == [*kept, [0, 0, 0]]
    assert metrics["rollout_rs_masked_fraction"] == pytest.approx((3 - sum(map(sum, kept))) / 3)


def test_criteria_add_up() -> None:
    old, rollout = logprobs(RATIOS)
    both = (Rejection("token_k1", Bounds(0.3, 5)), Rejection("seq_sum_k1", Bounds(0.1, 1.5)))
    mask, metrics = rejection_mask(old, rollout, MASK, both)
    assert mask.sum() == 0
    assert metrics == {"rollout_rs_masked_fraction": 1, "rollout_rs_seq_masked_fraction": 1}


def test_rejected_tokens_are_in_neither_numerator_nor_divisor() -> None:
    """Losses 1, 3 and 5, of which the 1 is rejected: (3 + 5) / 2.

    A weight of 0 keeps the divisor: (3 + 5) / 3.
    """
    loss = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    old, rollout = logprobs([[4.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    kept, _ = rejection_mask(old, rollout, MASK, (Rejection("token_k1", Bounds(0.5, 2)),))
    assert aggregate(loss, kept, "token-mean", loss_norm(kept, 3)).item() == 4
    weights, _ = importance_weights(old, rollout, MASK, CorrectionSettings("token", Bounds(0.5, 2)))
    assert aggregate(
        loss * weights, MASK, "token-mean", loss_norm(MASK, 3)
    ).item() == pytest.approx(8 / 3)
    whole, _ = rejection_mask(old, rollout, MASK, (Rejection("seq_sum_k1", Bounds(0.5, 2)),))
    assert aggregate(loss, whole, "seq-mean-token-mean", loss_norm(whole, 3)).item() == 5


def test_mismatch_by_hand() -> None:
    """Rollout log-probs -1; ratios 4, ½ | ¼: log-ratios 2ln2, -ln2 | -2ln2."""
    old, rollout = logprobs(RATIOS)
    metrics = mismatch_metrics(old, rollout, MASK)
    ln2 = math.log(2)
    first, second = 1 - ln2 / 2, 1 + 2 * ln2  # minus the mean log-prob of each sequence
    expected = {
        "kl": ln2 / 3,
        "k3_kl": ((4 - 1 - 2 * ln2) + (0.5 - 1 + ln2) + (0.25 - 1 + 2 * ln2)) / 3,
        "training_ppl": (math.exp(first) + math.exp(second)) / 2,
        "rollout_ppl": math.e,
        "log_ppl_diff": (-ln2 / 2 + 2 * ln2) / 2,
        "log_ppl_abs_diff": (ln2 / 2 + 2 * ln2) / 2,
        "ppl_ratio": (math.exp(-ln2 / 2) + 4) / 2,
        "chi2_token": (16 + 0.25 + 1 / 16) / 3 - 1,
        "chi2_seq": (4 + 1 / 16) / 2 - 1,
    }
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_settings_from_texts() -> None:
    assert correction_settings(None, 2.0, False, None, None) == CorrectionSettings()
    icepop = correction_settings("token", "0.5_5.0", False, None, None)
    assert icepop.is_bounds == Bounds(0.5, 5)
    several = correction_settings(None, 2.0, False, "seq_mean_k1, token_k2", "0.999_1.001,0.1")
    assert several.rejections == (
        Rejection("seq_mean_k1", Bounds(0.999, 1.001)),
        Rejection("token_k2", Bounds(0.0, 0.1)),
    )
    assert correction_settings(None, 2.0, False, "token_k1", 4).rejections[0].bounds == Bounds(
        0.25, 4
    )
    assert all(correction_settings(None, 2.0, False, kind, 2.0).rejections for kind in RS_KINDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokens", 2.0, False, None, None), "rollout_is: unknown 'tokens'; did you mean 'token'"),
        (("token", 0.52, False, None, None), "write a range as 0.5_2.0"),
        (("token", "2.0_0.5", False, None, None), "low 2 is above high 0.5"),
        (
            ("token", "high", False, None, None),
            "rollout_is_threshold = high: expected a number above 0",
        ),
        ((None, 2.0, False, "token_k4", 2.0), "rollout_rs: unknown 'token_k4'; did you mean"),
        ((None, 2.0, False, "token_k1", None), "rollout_rs_threshold is not set"),
        (
            (None, 2.0, False, "token_k2", "0.1_0.5"),
            "token_k2 is a divergence and has an upper bound only",
        ),
        ((None, 2.0, False, "token_k1,token_k2,token_k3", "2,3"), "2 values for 3 criteria"),
    ],
)
def test_settings_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correction_settings(*arguments)
