"""Chunked log-probs against torch's log_softmax: values and gradients, with and without chunks."""

from __future__ import annotations

import pytest
import torch

from rlhf3d.engine import logprobs as module
from rlhf3d.engine.logprobs import vocab_parallel_logprobs


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float):
    log_p = ((hidden @ weight.t()).float() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk_elements", [1 << 24, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk_elements: int, temperature: float) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (7,))
    scale = torch.randn(2, 7)

    def grads(outputs):
        loss = (outputs[0] * scale[0]).sum() + (outputs[1] * scale[1]).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    ours = vocab_parallel_logprobs(hidden, weight, labels, temperature=temperature)
    theirs = reference(hidden, weight, labels, temperature)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads(ours), grads(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_logprobs_used() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    labels = torch.tensor([0, 5, 2])
    ours = torch.autograd.grad(vocab_parallel_logprobs(hidden, weight, labels)[0].sum(), hidden)[0]
    theirs = torch.autograd.grad(reference(hidden, weight, labels, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(ours, theirs)


def test_no_tokens() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None and weight.grad.abs().sum() == 0
