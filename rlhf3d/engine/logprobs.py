"""Log-probabilities and entropy from hidden states, without the [tokens, vocabulary] matrix.

Invariant: logits exist for one block of the vocabulary at a time, at most the platform's
`head_block_elements` of a rank, in the forward pass and in the backward pass, where they are
computed again; the result equals log_softmax over the full vocabulary, however it is split over
ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf3d.parallel.platform import Platform

_LOWEST = torch.finfo(torch.float32).min
"""Below every logit; being finite, its difference from one is a number."""
_MULTIPLE_OF = 64
"""Blocks of the vocabulary have a multiple of this many rows, which suits matrix products."""


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    platform: Platform,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each label and the entropy of each distribution.

    Both are [T] in fp32. `hidden` [T, h]; `weight` [V/tp, h] is this rank's rows `vocab_start…` of
    the output matrix (those from global number `vocab_size` on are padding and take no part);
    `labels` [T] are global token ids. The gradient with respect to `hidden` is this rank's share:
    the caller sums it over the group (Megatron's `copy_to_tensor_model_parallel_region` does).
    """
    real = weight.shape[0]
    if vocab_size is not None:
        # Padding is at the end of the vocabulary: it takes all, some or none of this rank's rows.
        real = max(0, min(real, vocab_size - vocab_start))
    return _VocabParallelLogprobs.apply(
        hidden, weight, labels, 1.0 / temperature, vocab_start, real, group, platform
    )


def block_rows(tokens: int, elements: int) -> int:
    """Return how many rows of the vocabulary a block has, for logits of that many tokens."""
    # _MULTIPLE_OF rows at least, even where their logits alone are over the limit.
    return max(1, elements // max(tokens, 1) // _MULTIPLE_OF) * _MULTIPLE_OF


def _blocks(tokens: int, rows: int, platform: Platform) -> list[tuple[int, int]]:
    size = block_rows(tokens, platform.head_block_elements)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _local_labels(labels: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Labels [T, 1] as row numbers of a block, and which of them it holds."""
    local = labels - first
    owned = (local >= 0) & (local < rows)
    # Labels outside of it point to some row, as gather needs; `owned` zeroes their share.
    return local.clamp(0, rows - 1)[:, None], owned


class _Sums:
    """What a softmax needs of the logits [T, rows] of all blocks so far."""

    def __init__(self, like: Tensor) -> None:
        def column(value: float) -> Tensor:
            return torch.full((like.shape[0],), value, dtype=torch.float32, device=like.device)

        self.peak = column(_LOWEST)
        """The highest logit: subtracted, so that exp cannot overflow."""
        self.exp, self.weighted = column(0.0), column(0.0)
        """Sums of exp(logit - peak), and of that times the logit."""
        self.target = column(0.0)
        """The logit of the label, where a block had it."""

    def add(self, logits: Tensor, labels: Tensor, first: int) -> None:
        """Add a block, which starts at global row `first`; its memory is used up."""
        local, owned = _local_labels(labels, first, logits.shape[1])
        self.target += logits.gather(-1, local)[:, 0] * owned
        self.move_peak(torch.maximum(self.peak, logits.amax(dim=-1)))
        exp = (logits - self.peak[:, None]).exp_()
        self.exp += exp.sum(-1)
        self.weighted += exp.mul_(logits).sum(-1)

    def move_peak(self, peak: Tensor) -> None:
        """Express the sums by a higher peak."""
        shrink = (self.peak - peak).exp_()
        self.exp *= shrink
        self.weighted *= shrink
        self.peak = peak

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Make them those of all ranks."""
        peak = self.peak.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        self.move_peak(peak)
        # One all-reduce of [3, T], not three.
        sums = torch.stack([self.exp, self.weighted, self.target])
        dist.all_reduce(sums, group=group)
        self.exp, self.weighted, self.target = sums.unbind()


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        inverse_temperature: float,
        vocab_start: int,
        real: int,
        group: dist.ProcessGroup | None,
        platform: Platform,
    ) -> tuple[Tensor, Tensor]:
        hidden = hidden.to(weight.dtype)
        sums = _Sums(hidden)
        for start, stop in _blocks(hidden.shape[0], real, platform):
            logits = platform.product(hidden, weight[start:stop].t()).mul_(inverse_temperature)
            sums.add(logits, labels, vocab_start + start)
        if group is not None and group.size() > 1:
            sums.reduce(group)
        log_z = sums.peak + sums.exp.log()
        # Entropy is log Z minus the mean logit under the distribution.
        entropy = log_z - sums.weighted / sums.exp
        ctx.save_for_backward(hidden, weight, labels, log_z, entropy)
        ctx.inverse_temperature, ctx.vocab_start, ctx.real = inverse_temperature, vocab_start, real
        ctx.platform = platform
        # A loss that uses one output only gets None for the other, whose work is then left out.
        ctx.set_materialize_grads(False)
        return sums.target - log_z, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        hidden, weight, labels = tensors[:3]
        log_z, entropy = tensors[3:]
        platform, scale = ctx.platform, ctx.inverse_temperature
        # Summed over the blocks in fp32 and rounded once, at the end.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        # Each block has its own rows of this one; those of padding stay zero.
        grad_weight = torch.zeros_like(weight)
        for start, stop in _blocks(hidden.shape[0], ctx.real, platform):
            rows = weight[start:stop]
            log_p = platform.product(hidden, rows.t()).mul_(scale).sub_(log_z[:, None])
            grad = _grad_of_logits(log_p, entropy, grad_logprobs, grad_entropy)
            if grad_logprobs is not None:
                local, owned = _local_labels(labels, ctx.vocab_start + start, stop - start)
                grad.scatter_add_(-1, local, (grad_logprobs * owned)[:, None])
            grad = grad.mul_(scale).to(weight.dtype)
            platform.add_product(grad_hidden, grad, rows)
            torch.mm(grad.t(), hidden, out=grad_weight[start:stop])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None, None


def _grad_of_logits(
    log_p: Tensor, entropy: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """Return the gradient of logits [T, rows], labels left out, in the memory of `log_p`."""
    if grad_entropy is None:
        assert grad_logprobs is not None
        # d logprob / d logit = [is the label] - p
        return log_p.exp_().mul_(-grad_logprobs[:, None])
    p = log_p.exp()
    # d entropy / d logit = -p (log p + entropy)
    grad = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None])
    if grad_logprobs is not None:
        grad.add_(grad_logprobs[:, None])
    return grad.mul_(p).neg_()
