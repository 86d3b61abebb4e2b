"""Policy and value losses: clip cases by hand, gradients, masking."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf3d.algorithms.losses import (
    POLICY_LOSSES,
    PolicyLossSettings,
    PolicyLossTerms,
    compute_policy_loss,
    register_policy_loss,
    value_loss,
)
from rlhf3d.algorithms.names import POLICY_LOSSES as NAMES

SETTINGS = PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0)


def run(name: str, ratios: list[float], advantages: list[float]) -> tuple[PolicyLossTerms, Tensor]:
    """Loss terms of one row with these ratios, and the gradient to its log-probabilities (old:
    -1).
    """
    old = torch.full((1, len(ratios)), -1.0)
    logprobs = (old + torch.tensor([ratios]).log()).requires_grad_()
    weights = torch.tensor([advantages])
    terms = compute_policy_loss(name, logprobs, old, weights, torch.ones_like(old), SETTINGS)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    return terms, gradient


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped", "bounded"),
    [
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # inside the range
        (1.5, 2.0, -2.6, 0.0, 1, 0),  # A > 0 above 1.3: clipped
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # A > 0 below: the worse, unclipped side counts
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # A < 0 below 0.8: clipped
        (2.0, -2.0, 4.0, 4.0, 0, 0),  # A < 0 above, under the dual-clip bound
        (5.0, -2.0, 6.0, 0.0, 0, 1),  # A < 0 far above: at most c·|A|
        (1.5, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_vanilla_cases(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: int, bounded: int
) -> None:
    terms, grad = run("vanilla", [ratio], [advantage])
    assert terms.loss.item() == pytest.approx(loss, rel=1e-5)
    assert grad.item() == pytest.approx(gradient, rel=1e-5)
    assert terms.metrics["pg_clipfrac"].item() == clipped
    assert terms.metrics["pg_clipfrac_lower"].item() == bounded
    assert terms.metrics["ppo_kl"].item() == pytest.approx(-math.log(ratio), rel=1e-5)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "pg"])
def test_first_update_is_the_plain_policy_gradient(name: str) -> None:
    _, grad = run(name, [1.0, 1.0, 1.0], [2.0, -1.0, 0.5])
    assert torch.allclose(grad, torch.tensor([[-2.0, 1.0, -0.5]]))


def test_extreme_log_ratios_stay_finite() -> None:
    old = torch.tensor([[0.0], [-1000.0]])
    logprobs = torch.tensor([[-1000.0], [0.0]], requires_grad=True)
    for name in POLICY_LOSSES.names():
        advantages = torch.tensor([[1.0], [-1.0]])
        terms = compute_policy_loss(name, logprobs, old, advantages, torch.ones(2, 1), SETTINGS)
        (grad,) = torch.autograd.grad(terms.loss.sum(), logprobs)
        assert terms.loss.isfinite().all() and grad.isfinite().all(), name


def test_gspo_uses_the_geometric_mean_of_the_sequence() -> None:
    """Ratios 2 and 0.6: each token gets sqrt(1.2), inside the range though both are outside it."""
    terms, grad = run("gspo", [2.0, 0.6], [1.0, 1.0])
    assert torch.allclose(terms.loss, torch.full((1, 2), -math.sqrt(1.2)))
    assert torch.allclose(grad, torch.full((1, 2), -math.sqrt(1.2)))
    terms, grad = run(
        "gspo", [2.0, 1.0], [1.0, 1.0]
    )  # sqrt(2) > 1.3: the whole sequence is clipped
    assert terms.metrics["pg_clipfrac"].tolist() == [[1.0, 1.0]] and grad.abs().max() == 0
    assert run("gspo", [5.0], [-2.0])[0].loss.item() == pytest.approx(10.0)  # no dual clip


def test_cispo_clips_the_weight_and_keeps_the_gradient() -> None:
    terms, grad = run("cispo", [2.0, 0.5, 1.1], [1.0, 1.0, 1.0])
    assert torch.allclose(grad, torch.tensor([[-1.3, -0.8, -1.1]]))
    assert terms.metrics["pg_clipfrac"].tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "pg"])
def test_nothing_outside_the_mask(name: str) -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    data = torch.tensor([[-1.0, -2.0, math.nan], [math.inf, math.nan, -math.inf]])
    logprobs = data.clone().requires_grad_()
    old = torch.where(mask.bool(), data + 0.1, math.nan)
    advantages = torch.where(mask.bool(), torch.tensor(1.5), math.nan)
    terms = compute_policy_loss(name, logprobs, old, advantages, mask, SETTINGS)
    (grad,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    clean = compute_policy_loss(
        name, data[:1, :2], old[:1, :2], advantages[:1, :2], mask[:1, :2], SETTINGS
    )
    assert torch.equal(terms.loss[:1, :2], clean.loss)
    for outside in (terms.loss, grad, *terms.metrics.values()):
        assert outside[mask == 0].abs().max() == 0
    assert all(not value.requires_grad for value in terms.metrics.values())


def test_rollout_weights_multiply_the_loss_alone() -> None:
    old = torch.full((1, 2), -1.0)
    logprobs = (old + torch.tensor([[1.1, 2.0]]).log()).requires_grad_()
    arguments = (logprobs, old, torch.tensor([[2.0, 1.0]]), torch.ones(1, 2), SETTINGS)
    weights = torch.tensor([[0.5, 3.0]])
    plain, weighted = (
        compute_policy_loss("vanilla", *arguments),
        compute_policy_loss("vanilla", *arguments, weights),
    )
    assert torch.allclose(weighted.loss, torch.tensor([[-1.1, -3.9]]))  # ½ · -2.2 and 3 · -1.3
    assert all(torch.equal(plain.metrics[name], weighted.metrics[name]) for name in plain.metrics)


def test_value_loss_by_hand() -> None:
    """Old value 0, clip range 0.5; (value, return) pairs."""
    values = torch.tensor([[0.2, 2.0, 2.0, math.nan]], requires_grad=True)
    old = torch.zeros(1, 4)
    returns = torch.tensor([[1.0, 1.5, -1.0, math.nan]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss, clipped = value_loss(values, old, returns, mask, 0.5)
    # in range: ½·0.8²; clip moves away from the return: ½·(0.5 - 1.5)²; unclipped is worse: ½·3²
    assert torch.allclose(loss, torch.tensor([[0.32, 0.5, 4.5, 0.0]]))
    assert clipped.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    loss.sum().backward()
    assert values.grad is not None
    assert torch.allclose(values.grad, torch.tensor([[-0.8, 0.0, 3.0, 0.0]]))


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [({"clip_ratio_low": -0.1}, "clip_ratio_low"), ({"clip_ratio_c": 1.0}, "clip_ratio_c")],
)
def test_settings_refused(kwargs: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        PolicyLossSettings(**kwargs)


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert POLICY_LOSSES.names() == sorted(NAMES), "those that the configuration offers"
    with pytest.raises(
        ValueError, match=r"actor\.policy_loss: unknown 'vanila'; did you mean 'vanilla'"
    ):
        run("vanila", [1.0], [1.0])
    monkeypatch.setattr(POLICY_LOSSES, "_entries", dict(POLICY_LOSSES._entries))

    @register_policy_loss("double")
    def double(
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        settings: PolicyLossSettings,
    ) -> PolicyLossTerms:
        return PolicyLossTerms(-2 * advantages * logprobs)

    terms, grad = run("double", [1.0], [3.0])
    assert grad.item() == -6.0 and terms.metrics == {}
