"""Rollout correction: the engine that sampled is not quite the policy that trains.

With r = π_old / π_rollout of each token (training engine over rollout engine, same weights):

* importance weights (`rollout_is`) multiply the policy loss and leave its divisor alone: truncated,
  min(r, C) (TIS, https://fengyao.notion.site/off-policy-rl; sequence level:
  https://richardli.xyz/rl-collapse), or masked, r inside [low, high] and 0 outside (IcePop,
  https://ringtech.notion.site/icepop);
* rejection (`rollout_rs`) takes tokens or complete sequences out of the loss's mask: they are in
  neither the numerator nor the divisor, which counts what is left. Bounds of k1 are bounds of r, as
  on verl's theory page; verl's code bounds 1/r, so a range that is not symmetric (low != 1/high)
  must be inverted when it comes from there: verl's 0.5_4.0 is 0.25_2.0 here.

Invariant: both are functions of the complete batch, computed once before the update, so no cut of
the batch changes them; statistics are over non-empty sequences. Names are verl's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf3d.algorithms.correction_settings import CorrectionSettings, Rejection
from rlhf3d.algorithms.kl import LOG_RATIO_CLAMP
from rlhf3d.algorithms.masked import masked_mean, masked_sum, zero_outside
from rlhf3d.algorithms.names import IS_LEVELS

_ROWS = 64
"""Rows that are computed on in float64 at a time: of a large batch, columns of that are slow."""


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, settings: CorrectionSettings
) -> tuple[Tensor, dict[str, float]]:
    """(weights [N, R], 0 outside the mask; statistics), all arguments [N, R].

    token: r_t of each token. sequence: the product of the sequence's ratios, on each of its tokens.
    Logs of ratios are clamped to ±20. The statistics are verl's: mean, min and max of the ratios
    before the threshold; standard deviation and effective sample size (Kish's, (Σw)² / (n Σw²): 1
    when all are equal) of the ratios clamped to [low, high], where low is 1/high for a single
    threshold; shares of ratios outside. Mean, deviation and sample size are over tokens, the others
    over tokens or sequences, as the level says.
    """
    assert settings.is_level in IS_LEVELS, settings.is_level
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask)
    sequences = mask.bool().any(-1)
    # `logs` and what follows from it: [N, R] at the token level, [N] at the sequence level.
    if settings.is_level == "token":
        logs, counted = log_ratio, mask.bool()
    else:
        # 0 outside the mask, so this is the log of the product over the response's tokens.
        logs, counted = log_ratio.sum(-1), sequences
    ratio = logs.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    low, high = settings.is_bounds.low, settings.is_bounds.high
    # Without a lower bound TIS, with one IcePop.
    weights = (
        ratio.clamp(max=high)
        if low == 0
        else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    )
    on_tokens = ratio if settings.is_level == "token" else ratio[:, None].expand_as(log_ratio)
    metrics = _ratio_metrics(ratio[counted], on_tokens[mask.bool()], low or 1 / high, high)
    if settings.batch_normalize:
        # Over sequences at the sequence level: a long one weighs no more than a short one.
        mean = float(weights[counted].mean())
        if mean == 0:
            raise ValueError(
                "algorithm.rollout_correction: every weight of the batch is 0, so it has no mean "
                "to divide by; widen rollout_is_threshold or set rollout_is_batch_normalize=false"
            )
        weights = weights / mean
        metrics["rollout_is_batch_norm_factor"] = mean
    on_tokens = weights if settings.is_level == "token" else weights[:, None].expand_as(log_ratio)
    return zero_outside(on_tokens, mask).to(old_logprobs.dtype), metrics


def _ratio_metrics(ratios: Tensor, on_tokens: Tensor, low: float, high: float) -> dict[str, float]:
    """Statistics of `ratios` [n], of tokens or sequences, and of each token's, `on_tokens` [t]."""
    clamped = on_tokens.clamp(low, high)
    return {
        "rollout_is_mean": float(on_tokens.mean()),
        # Bessel's correction would make it NaN for a single token.
        "rollout_is_std": float(clamped.std(unbiased=False)),
        "rollout_is_max": float(ratios.max()),
        "rollout_is_min": float(ratios.min()),
        "rollout_is_ratio_fraction_high": float((ratios > high).double().mean()),
        "rollout_is_ratio_fraction_low": float((ratios < low).double().mean()),
        "rollout_is_eff_sample_size": effective_sample_size(clamped),
    }


def effective_sample_size(weights: Tensor) -> float:
    """Kish's effective share of samples with `weights` [n], in (0, 1].

    (Σw)² / (n Σw²); NaN when all are 0.
    """
    w = weights.double()
    return float(w.sum().square() / (len(w) * w.square().sum()))


def rejection_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, rejections: tuple[Rejection, ...]
) -> tuple[Tensor, dict[str, float]]:
    """(`mask` [N, R] without the rejected tokens; statistics), all arguments [N, R].

    With l = log r, a token or sequence is kept when its k1 = r, k2 = l²/2 or k3 = r - 1 - l lies
    within bounds: of the token, or of the sequence's sum, mean or largest (k1: product or geometric
    mean of ratios). A token stays when every criterion keeps it.
    """
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask)
    inside = mask.bool()
    kept = inside.clone()
    for rejection in rejections:
        kept &= _trusted(log_ratio, mask, rejection)
    sequences = inside.any(-1)
    # Share of the response tokens, and of the sequences that lost at least one.
    rejected_tokens = (inside & ~kept)[inside].double().mean()
    touched = (inside & ~kept).any(-1)[sequences].double().mean()
    return kept.to(mask.dtype), {
        "rollout_rs_masked_fraction": float(rejected_tokens),
        "rollout_rs_seq_masked_fraction": float(touched),
    }


def _trusted(log_ratio: Tensor, mask: Tensor, rejection: Rejection) -> Tensor:
    """[N, R] True where a criterion keeps the token."""
    # "seq_mean_k1" is level "seq_mean" and kind "k1".
    level, _, kind = rejection.kind.rpartition("_")
    bounds = rejection.bounds
    if kind == "k1":
        # Bounds of r, compared as logs: a long sequence's product cannot overflow, and the mean of
        # the logs is the log of the geometric mean.
        per_token, low, high = log_ratio, math.log(bounds.low), math.log(bounds.high)
    else:
        clamped = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        # k3 by expm1, which keeps the digits that exp(l) - 1 loses near 0.
        per_token = 0.5 * log_ratio.square() if kind == "k2" else clamped.expm1() - clamped
        # Neither k2 nor k3 is ever negative, so they have no lower bound.
        low, high = 0.0, bounds.high
    if level == "token":
        value = per_token
    elif level == "seq_sum":
        value = masked_sum(per_token, mask, dim=-1)[:, None]
    elif level == "seq_mean":
        value = masked_mean(per_token, mask, dim=-1)[:, None]
    else:
        # 0 is the smallest k2 and k3 (there is no seq_max_k1): padding is never the largest.
        value = zero_outside(per_token, mask).amax(-1)[:, None]
    # [N, R], or [N, 1] where a sequence's tokens share one verdict.
    return ((value >= low) & (value <= high)).expand_as(log_ratio)


def mismatch_metrics(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> dict[str, float]:
    """The difference between the two engines before any correction; all arguments [N, R].

    kl and k3_kl estimate KL(rollout, old) per token; training_ppl and rollout_ppl are means over
    sequences of exp(-mean log-prob), log_ppl_diff the mean difference of their logs (training -
    rollout), ppl_ratio the mean of its exponential; chi2_token and chi2_seq are mean r² - 1 (r of a
    token, or of a sequence: product).
    """
    parts = []
    for start in range(0, len(mask), _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(_mismatch_of_rows(old_logprobs[rows], rollout_logprobs[rows], mask[rows]))
    tokens, old, rollout, products = map(torch.cat, zip(*parts, strict=True))
    clamped = tokens.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return {
        # The engine drew the tokens, so -log r on average estimates KL(rollout, old).
        "kl": float(-tokens.mean()),
        "k3_kl": float((clamped.expm1() - clamped).mean()),
        "training_ppl": float(old.exp().mean()),
        "rollout_ppl": float(rollout.exp().mean()),
        "log_ppl_diff": float((old - rollout).mean()),
        "log_ppl_abs_diff": float((old - rollout).abs().mean()),
        "ppl_ratio": float((old - rollout).exp().mean()),
        # exp(2 log r) is r².
        "chi2_token": float((2 * clamped).exp().mean() - 1),
        "chi2_seq": float((2 * products).exp().mean() - 1),
    }


def _mismatch_of_rows(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log r of the tokens; and of each sequence minus the mean log-prob, which is the log of its
    perplexity, of both engines, and the log of the product of its ratios.
    """
    inside = mask.bool()
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, mask)
    sequences = inside.any(-1)
    old, rollout = (
        -masked_mean(x.double(), mask, dim=-1)[sequences] for x in (old_logprobs, rollout_logprobs)
    )
    products = log_ratio.sum(-1)[sequences].clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return log_ratio[inside], old, rollout, products


def _log_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log r [N, R] in float64, 0 outside the mask."""
    # float64: rounding adds up over a sequence's tokens, and the sum is an exponent.
    return zero_outside(old_logprobs.double() - rollout_logprobs.double(), mask)
