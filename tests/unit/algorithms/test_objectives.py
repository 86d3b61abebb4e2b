"""Objectives: the same loss, gradient and metrics however a mini-batch is cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import Tensor

from rlhf3d.algorithms.aggregation import AGGREGATION_MODES, LossNorm, loss_norm
from rlhf3d.algorithms.losses import POLICY_LOSSES, PolicyLossSettings
from rlhf3d.algorithms.objectives import PolicyObjective, ValueObjective
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import for_update
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.engine.microbatch import make_microbatch

CUTS = [[[0, 1, 2, 3, 4, 5]], [[3], [0, 5], [4, 2, 1]], [[i] for i in range(6)]]


def batch() -> Batch:
    """Six responses of 0 to 5 tokens; two tokens of row 3 are rejected."""
    rng = torch.Generator().manual_seed(0)
    rows = from_sequences([[1, 2]] * 6, [[3] * length for length in (5, 1, 0, 4, 2, 3)], 0)
    names = (
        "old_logprobs",
        "ref_logprobs",
        "advantages",
        "values",
        "returns",
        "rollout_is_weights",
    )
    draws = {name: torch.randn(rows["response_mask"].shape, generator=rng) for name in names}
    mask = rows["response_mask"].clone()
    mask[3, :2] = 0
    return rows.with_columns(**draws, response_mask=mask)


def total(
    objective: PolicyObjective | ValueObjective, cut: list[list[int]]
) -> tuple[dict[str, float], Tensor]:
    """Metrics and gradient to the model's outputs, summed over the parts."""
    rows = batch()
    rng = torch.Generator().manual_seed(1)
    outputs = torch.randn(rows["response_mask"].shape, generator=rng, requires_grad=True)
    entropy = torch.rand(rows["response_mask"].shape, generator=rng)
    norm: LossNorm = loss_norm(rows["response_mask"], 5)
    metrics: dict[str, float] = {}
    for part in cut:
        micro = make_microbatch(rows, part, Tensor.contiguous, MicroBatching(1))
        r = micro.rows["response_mask"].shape[1]
        name = "logprobs" if isinstance(objective, PolicyObjective) else "values"
        columns = {name: outputs[part][:, :r], "entropy": entropy[part][:, :r]}
        loss, shares = objective(micro.rows.columns, columns, norm)
        loss.backward()
        for name, value in shares.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    assert outputs.grad is not None
    return metrics, outputs.grad


OBJECTIVES = [
    PolicyObjective(name, PolicyLossSettings(), mode, 0.01, 0.1, "k3+")
    for name, mode in zip(cycle(POLICY_LOSSES.names()), AGGREGATION_MODES, strict=False)
]


@pytest.mark.parametrize(
    "objective", [*OBJECTIVES, ValueObjective(0.2, "seq-mean-token-mean")], ids=str
)
def test_no_cut_changes_loss_gradient_or_metrics(
    objective: PolicyObjective | ValueObjective,
) -> None:
    whole, gradient = total(objective, CUTS[0])
    assert gradient[3, :2].abs().max() == 0 and gradient[3, 2:4].abs().min() >= 0
    for cut in CUTS[1:]:
        metrics, other = total(objective, cut)
        assert metrics == pytest.approx(whole, rel=1e-6, abs=1e-6)
        assert torch.allclose(gradient, other, atol=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES.names())
@pytest.mark.parametrize("turns", [False, True])
def test_a_policy_that_is_its_own_old_one_has_ratio_1(name: str, turns: bool) -> None:
    """Bit by bit as with a column of the same log-probs, which it does not read."""
    rows = batch()
    if turns:
        rows = for_update(rows.with_columns(trajectory_ids=torch.tensor([0, 0, 0, 1, 1, 2])))
    rng = torch.Generator().manual_seed(1)
    logprobs = torch.randn(rows["response_mask"].shape, generator=rng, requires_grad=True)
    entropy = torch.rand(logprobs.shape, generator=rng)
    norm = loss_norm(rows["response_mask"], 5)
    objective = PolicyObjective(name, PolicyLossSettings(), "seq-mean-token-mean", 0.01, 0.1, "k3+")
    found = []
    for own in (False, True):
        columns = dict(rows.columns)
        if own:
            del columns["old_logprobs"]
        else:
            columns["old_logprobs"] = logprobs.detach().clone()
        outputs = {"logprobs": logprobs, "entropy": entropy}
        loss, metrics = replace(objective, old_is_current=own)(columns, outputs, norm)
        [gradient] = torch.autograd.grad(loss, logprobs)
        found.append((loss, gradient, metrics))
    (loss, gradient, metrics), (own_loss, own_gradient, own_metrics) = found
    assert torch.equal(loss, own_loss) and torch.equal(gradient, own_gradient)
    assert metrics == own_metrics and own_metrics["actor/ppo_kl"] == 0
    assert gradient.abs().max() > 0


def test_loss_is_the_sum_of_its_terms() -> None:
    metrics, _ = total(
        PolicyObjective("vanilla", PolicyLossSettings(), "token-mean", 0.01, 0.1, "k2"), CUTS[0]
    )
    expected = (
        metrics["actor/pg_loss"] - 0.01 * metrics["actor/entropy"] + 0.1 * metrics["actor/kl_loss"]
    )
    assert metrics["actor/loss"] == pytest.approx(expected, rel=1e-5)
