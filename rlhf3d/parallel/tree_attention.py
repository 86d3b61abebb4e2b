"""Attention of sequences that share their beginnings, each shared token computed once.

Invariant: exactly what each sequence alone would get, forward and backward, to round-off. A token
sees the tokens before it in its own segment, and all of each segment that its sequence begins with.
torch's kernel computes one such part at a time; parts are merged by the logarithm of the sum that
each softmax divides by, and given those of the complete softmax the kernel's backward pass returns
each part's share of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rlhf3d.parallel.short_attention import attend_backward

TreeSpan = tuple[int, int, int]
"""A segment in the line of tokens: its first position, the one behind its last, and the one behind
the last that follows it in some sequence. Those that do come right behind it."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class TreeParams(PackedSeqParams):
    """A line of segments that sequences share; Megatron hands it from the model to attention.

    `qkv_format` is that of padded rows: the line is one of them to everything but attention.
    """

    segments: Sequence[TreeSpan] = ()
    """All tokens of the line, in order."""


def attend_along_tree(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[TreeSpan], scale: float
) -> Tensor:
    """query [s, 1, h, d], key and value [s, 1, g, d] -> [s, 1, h*d]."""
    assert query.shape[1] == 1 and segments[-1][1] == query.shape[0], (
        f"segments end at {segments[-1][1]} of {query.shape[0]} tokens in {query.shape[1]} rows"
    )
    heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    out: Tensor = _TreeAttention.apply(*heads_first, segments, scale)
    return out.permute(2, 0, 1, 3).flatten(2)


def _parts(segments: Sequence[TreeSpan]) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each part: every segment's own, then those that follow it.

    The first kind, equal slices, covers all queries once.
    """
    for start, stop, _ in segments:
        yield slice(start, stop), slice(start, stop)
    for start, stop, reach in segments:
        if reach > stop:
            yield slice(stop, reach), slice(start, stop)


class _TreeAttention(torch.autograd.Function):
    """Heads first: query [1, h, s, d], key and value [1, g, s, d] -> [1, h, s, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[TreeSpan],
        scale: float,
    ) -> Tensor:
        out, total = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        for at, seen in _parts(segments):
            q, k, v = query[:, :, at], key[:, :, seen], value[:, :, seen]
            part, part_total = _attend(q, k, v, is_causal=at == seen, scale=scale)
            if at != seen:
                before, before_total = out[:, :, at], total[:, :, at]
                weight = torch.sigmoid(part_total - before_total)[..., None]
                part = torch.lerp(before.float(), part.float(), weight)
                part_total = torch.logaddexp(before_total, part_total)
            out[:, :, at], total[:, :, at] = part, part_total
        ctx.save_for_backward(query, key, value, out, total)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        # Parts are summed in fp32 at least, and rounded once.
        exact = torch.promote_types(query.dtype, torch.float32)
        sums = [torch.empty_like(x, dtype=exact) for x in (query, key, value)]
        for at, seen in _parts(ctx.segments):
            gradients = attend_backward(
                grad[:, :, at],
                query[:, :, at],
                key[:, :, seen],
                value[:, :, seen],
                out[:, :, at],
                total[:, :, at].contiguous(),
                causal=at == seen,
                scale=ctx.scale,
            )
            for of_all, place, gradient in zip(sums, (at, seen, seen), gradients, strict=True):
                if at == seen:
                    of_all[:, :, place].copy_(gradient)
                else:
                    of_all[:, :, place].add_(gradient)
        return (*(of_all.to(grad.dtype) for of_all in sums), None, None)
