"""KL estimators and controllers."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf3d.algorithms.kl import KL_KINDS, kl_estimate, make_kl_controller

LOGP = torch.tensor([-1.0, -2.0])
REF = torch.tensor([-1.5, -1.0])  # log-ratios 0.5 and -1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.5, -1.0]),
        ("abs", [0.5, 1.0]),
        ("k2", [0.125, 0.5]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2.0]),
        ("low_var_kl", [math.exp(-0.5) - 0.5, math.e - 2.0]),
    ],
)
def test_numbers_by_hand(kind: str, expected: list[float]) -> None:
    assert kl_estimate(LOGP, REF, kind).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "gradient"),
    [
        ("k1", [1.0, 1.0]),
        ("abs", [1.0, -1.0]),
        ("k2", [0.5, -1.0]),
        ("k3", [1.0 - math.exp(-0.5), 1.0 - math.e]),
    ],
)
def test_gradients_by_hand(kind: str, gradient: list[float]) -> None:
    logp = LOGP.clone().requires_grad_()
    kl_estimate(logp, REF, kind).sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx(gradient, rel=1e-6)


@pytest.mark.parametrize(("alias", "kind"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_names_of_verl(alias: str, kind: str) -> None:
    assert torch.equal(kl_estimate(LOGP, REF, alias), kl_estimate(LOGP, REF, kind))


@pytest.mark.parametrize("kind", [kind for kind in KL_KINDS if not kind.endswith("+")])
def test_straight_through_has_the_value_of_one_and_the_gradient_of_k2(kind: str) -> None:
    """The gradient of l²/2 is l: ½ and -1."""
    logp = LOGP.clone().requires_grad_()
    estimate = kl_estimate(logp, REF, f"{kind}+")
    assert torch.equal(estimate, kl_estimate(LOGP, REF, kind))
    (gradient,) = torch.autograd.grad(estimate.sum(), logp)
    assert torch.equal(gradient, torch.tensor([0.5, -1.0]))


def test_gradient_of_k2_is_that_of_the_kl() -> None:
    """Σ p ∇l²/2 over the whole distribution against autograd of Σ p log(p/q); of k1 it is 0."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - log_q)).sum(), logits, retain_graph=True)
    for kind, expected in (("k3+", exact), ("k2", exact), ("k1", torch.zeros_like(exact))):
        sampled = (logp.exp().detach() * kl_estimate(logp, log_q, kind)).sum()
        (gradient,) = torch.autograd.grad(sampled, logits, retain_graph=True)
        assert torch.allclose(gradient, expected, atol=1e-12), kind


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_over_the_whole_distribution(kind: str) -> None:
    """Summed over all tokens with their probability, k1 and k3 are the KL itself."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    assert (p * kl_estimate(p.log(), q.log(), kind)).sum().item() == pytest.approx(
        exact.item(), rel=1e-12
    )


def test_k3_is_clamped_and_finite() -> None:
    logp = torch.tensor([-200.0, 0.0], requires_grad=True)
    ref = torch.tensor([0.0, -200.0])
    estimate = kl_estimate(logp, ref, "k3")
    assert estimate.tolist() == [10.0, 10.0]  # exp(20) - 21 and 20 - 1, both clamped
    estimate.sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", KL_KINDS)
def test_nothing_outside_the_mask(kind: str) -> None:
    logp = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    kl = kl_estimate(logp, torch.tensor([[-1.5, -math.inf]]), kind, torch.tensor([[1.0, 0.0]]))
    kl.sum().backward()
    assert kl[0, 1] == 0 and kl[0, 0] != 0
    assert logp.grad is not None and logp.grad[0, 1] == 0 and logp.grad.isfinite().all()


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'low_var_kl'"):
        kl_estimate(LOGP, REF, "lowvar_kl")


def test_fixed_controller_stays() -> None:
    controller = make_kl_controller("fixed", 0.01, 0.1, 100)
    controller.update(5.0, 10)
    assert controller.value == 0.01


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.11, 0.01 * 1.01),
        (1.0, 0.01 * 1.02),
        (0.0, 0.01 * 0.98),
        (0.1, 0.01),
    ],  # error 0.1, 0.2, -0.2, 0
)
def test_adaptive_controller_by_hand(kl: float, expected: float) -> None:
    controller = make_kl_controller("adaptive", 0.01, 0.1, 100)
    controller.update(kl, 10)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_adaptive_controller_resumes_exactly() -> None:
    first = make_kl_controller("adaptive", 0.01, 0.1, 1000)
    first.update(0.3, 64)
    second = make_kl_controller("adaptive", 0.5, 0.1, 1000)
    second.load_state_dict(first.state_dict())
    first.update(0.12, 64)
    second.update(0.12, 64)
    assert second.value == first.value
    with pytest.raises(ValueError, match=r"kl_ctrl\.type=fixed"):
        make_kl_controller("fixed", 0.01, 0.1, 1000).load_state_dict(first.state_dict())


def test_controller_mistakes() -> None:
    with pytest.raises(ValueError, match="did you mean 'adaptive'"):
        make_kl_controller("adaptve", 0.01, 0.1, 100)
    with pytest.raises(ValueError, match="target_kl=0"):
        make_kl_controller("adaptive", 0.01, 0, 100)
    controller = make_kl_controller("adaptive", 0.01, 0.1, 100)
    with pytest.raises(ValueError, match="nan"):
        controller.update(math.nan, 1)
    with pytest.raises(ValueError, match="set it above 100"):
        controller.update(0.1, 500)
