"""Log-probabilities and entropy from hidden states, without the [tokens, vocabulary] matrix.

Invariant: at most the platform's `head_chunk_elements` logits of a rank exist at once, in the
forward pass and in the backward pass, where they are computed again; the result equals log_softmax
over the full vocabulary, however it is split over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf3d.parallel.platform import Platform

_MASKED = torch.finfo(torch.float32).min
"""Logit of padded columns: their probability is 0, and being finite, 0 times it is 0."""


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


def _chunks(tokens: int, vocab: int, elements: int) -> list[tuple[int, int]]:
    # One token at least, even where its logits alone are over the limit.
    size = max(1, elements // vocab)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _local_labels(labels: Tensor, vocab_start: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Labels as this rank's row numbers, and which of them it holds."""
    local = labels - vocab_start
    owned = (local >= 0) & (local < vocab)
    # Labels of other ranks point to some valid row, as gather needs; `owned` zeroes their share.
    return local.clamp(0, vocab - 1), owned


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
        tokens, vocab = hidden.shape[0], weight.shape[0]
        parallel = group is not None and group.size() > 1
        logprobs, entropy, log_z = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        for start, stop in _chunks(tokens, vocab, platform.head_chunk_elements):
            logits = platform.product(hidden[start:stop], weight.t()).mul_(inverse_temperature)
            logits[:, real:] = _MASKED
            # [t] the highest logit over all ranks: subtracted, so that exp cannot overflow.
            peak = logits.amax(dim=-1)
            if parallel:
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            local, owned = _local_labels(labels[start:stop], vocab_start, vocab)
            # [t] the logit of the label where this rank holds it, else 0: summed, it is the logit.
            target = logits.gather(-1, local[:, None])[:, 0] * owned
            exp = (logits - peak[:, None]).exp_()
            # One all-reduce of [3, t], not three. The second entry overwrites `exp`, so the first
            # comes before it.
            sums = torch.stack([exp.sum(-1), exp.mul_(logits).sum(-1), target])
            if parallel:
                dist.all_reduce(sums, group=group)
            log_z[start:stop] = peak + sums[0].log()
            # Entropy is log Z minus the mean logit under the distribution.
            entropy[start:stop] = log_z[start:stop] - sums[1] / sums[0]
            logprobs[start:stop] = sums[2] - log_z[start:stop]
        ctx.save_for_backward(hidden, weight, labels, log_z, entropy)
        ctx.inverse_temperature, ctx.vocab_start, ctx.real = inverse_temperature, vocab_start, real
        ctx.platform = platform
        # A loss that uses one output only gets None for the other, whose work is then left out.
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        hidden, weight, labels = tensors[:3]
        log_z, entropy = tensors[3:]
        vocab, platform = weight.shape[0], ctx.platform
        grad_hidden = torch.zeros_like(hidden)
        # Summed over the chunks in fp32 and rounded once, at the end.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start, stop in _chunks(hidden.shape[0], vocab, platform.head_chunk_elements):
            part = hidden[start:stop]
            log_p = (
                platform.product(part, weight.t())
                .mul_(ctx.inverse_temperature)
                .sub_(log_z[start:stop, None])
            )
            log_p[:, ctx.real :] = _MASKED
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_logprobs is not None:
                g = grad_logprobs[start:stop]
                local, owned = _local_labels(labels[start:stop], ctx.vocab_start, vocab)
                # d logprob / d logit = [is the label] - p
                grad.addcmul_(p, g[:, None], value=-1)
                grad.scatter_add_(-1, local[:, None], (g * owned)[:, None])
            if grad_entropy is not None:
                # d entropy / d logit = -p (log p + entropy); in place: log_p is not read again.
                surprise = log_p.add_(entropy[start:stop, None])
                grad.addcmul_(p * surprise, grad_entropy[start:stop, None], value=-1)
            grad = grad.mul_(ctx.inverse_temperature).to(weight.dtype)
            grad_hidden[start:stop] = grad @ weight
            platform.add_product(grad_weight, grad.t(), part)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None
