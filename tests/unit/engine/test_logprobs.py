"""Log-probs in blocks against torch's log_softmax: values and gradients, of one block and more."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from rlhf3d.engine import logprobs as module
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform, Platform

CPU = CPUPlatform("test")
vocab_parallel_logprobs = partial(module.vocab_parallel_logprobs, platform=CPU)


BLOCK = module.block_rows(1, 1)
"""Rows of the smallest block."""


class SmallBlocks(CPUPlatform):
    """The smallest blocks of the vocabulary."""

    head_block_elements = 1


class Wide(SmallBlocks):
    """Products that are not rounded before they are added up, as on GPUs."""

    added: ClassVar[list[int]] = []

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.float() @ b.float()

    def add_product(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        assert total.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        self.added.append(b.shape[0])
        total.addmm_(a.float(), b.float())


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float):
    log_p = ((hidden @ weight.t()).float() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("platform", [CPU, SmallBlocks("test")])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(platform: CPUPlatform, temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = 2 * BLOCK + 3
    weight = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, rows - 2, rows - 1])
    scale = torch.randn(2, 7)

    def grads(outputs):
        loss = (outputs[0] * scale[0]).sum() + (outputs[1] * scale[1]).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    ours = vocab_parallel_logprobs(
        hidden, weight, labels, temperature=temperature, platform=platform
    )
    theirs = reference(hidden, weight, labels, temperature)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads(ours), grads(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [6, 11])
def test_padded_rows_take_no_part(vocab: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, requires_grad=True)
    padded = torch.randn(11, 5, requires_grad=True)
    labels = torch.randint(0, vocab, (7,))
    ours = vocab_parallel_logprobs(
        hidden, padded, labels + 100, vocab_start=100, vocab_size=100 + vocab
    )
    theirs = reference(hidden, padded[:vocab], labels, 1.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    grads = [
        torch.autograd.grad(o[0].sum() + 0.3 * o[1].sum(), (hidden, padded)) for o in (ours, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not grads[0][1][vocab:].any()


def test_only_logprobs_used() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    labels = torch.tensor([0, 5, 2])
    ours = torch.autograd.grad(vocab_parallel_logprobs(hidden, weight, labels)[0].sum(), hidden)[0]
    theirs = torch.autograd.grad(reference(hidden, weight, labels, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(ours, theirs)


def test_nothing_is_rounded_between_the_products_and_their_sum_where_the_hardware_allows_it() -> (
    None
):
    """In bfloat16, and of many blocks, against float64; on CPU the products come rounded."""
    torch.manual_seed(0)
    rows = 16 * BLOCK
    hidden, weight = torch.randn(64, 32).bfloat16() / 8, torch.randn(rows, 32).bfloat16()
    labels = torch.randint(0, rows, (64,))

    def run(platform: CPUPlatform, dtype: torch.dtype) -> list[torch.Tensor]:
        states, matrix = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
        if dtype == torch.float64:
            logprobs = reference(states, matrix, labels, 1.0)[0]
        else:
            logprobs = module.vocab_parallel_logprobs(states, matrix, labels, platform=platform)[0]
        return [logprobs.detach().double(), torch.autograd.grad(logprobs.sum(), states)[0].double()]

    exact = run(CPU, torch.float64)
    rounded, wide = (
        run(platform, torch.bfloat16) for platform in (SmallBlocks("test"), Wide("test"))
    )
    errors = [
        [(a - b).abs().mean() for a, b in zip(found, exact, strict=True)]
        for found in (rounded, wide)
    ]
    assert errors[1][0] < 0.01 * errors[0][0] and errors[1][1] < errors[0][1]
    assert Wide.added == [BLOCK] * 16


def test_products_on_gpus_are_wide() -> None:
    """Their kernels take bfloat16 and give float32; here without numbers."""
    cuda = CUDAPlatform("test")
    a = b = torch.empty(4, 4, dtype=torch.bfloat16, device="meta")
    total = torch.empty(4, 4, device="meta")
    assert cuda.product(a, b).dtype == torch.float32
    cuda.add_product(total, a, b)
    assert cuda.head_block_elements == 64 * CPU.head_block_elements


@pytest.mark.parametrize("platform", [CPU, CUDAPlatform("test")])
def test_no_more_logits_at_once_than_the_platform_wants(platform: Platform) -> None:
    for tokens in (1, 370, 8192):
        elements = tokens * module.block_rows(tokens, platform.head_block_elements)
        assert 0.9 * platform.head_block_elements < elements <= platform.head_block_elements


def test_no_tokens() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None and weight.grad.abs().sum() == 0


def padded_share(
    rank: int, port: int, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> list:
    """Log-probs, entropy and gradients on the rank that holds rows 2 rank and 2 rank + 1 of a
    padded weight.
    """
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    padded = torch.cat([weight, torch.full((3, 4), 7.0)])[2 * rank : 2 * rank + 2].requires_grad_()
    states = hidden.clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        states, padded, labels, vocab_start=2 * rank, vocab_size=5, group=dist.group.WORLD
    )
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    return [logprobs.detach(), entropy.detach(), states.grad, padded.grad]


def test_five_rows_over_four_ranks() -> None:
    """The third rank has one real row, the fourth none."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    theirs = reference(hidden, weight, labels, 1.0)
    grads = torch.autograd.grad(theirs[0].sum() + 0.3 * theirs[1].sum(), (hidden, weight))
    ranks = run_ranks(4, padded_share, hidden.detach(), weight.detach(), labels)
    for logprobs, entropy, _, _ in ranks:
        torch.testing.assert_close(logprobs, theirs[0])
        torch.testing.assert_close(entropy, theirs[1])
    torch.testing.assert_close(sum(rank[2] for rank in ranks), grads[0])
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks])[:5], grads[1])
    assert not any(rank[3][max(0, 5 - 2 * i) :].any() for i, rank in enumerate(ranks))
