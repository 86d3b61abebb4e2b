"""Core attention of the CPU platform: torch's SDPA inside Megatron's self-attention.

Invariant: causal, over the heads of this tensor-parallel rank only. No [s, s] matrix is
materialized, except under context parallelism, which gathers keys and values, a mask [s / 2cp, s].
Right-padded batches need no mask: padding comes after every real token, so causality hides it.
Sequences that share their beginnings are attended to in `tree_attention.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from rlhf3d.parallel.context import gathered_order, held_chunks
from rlhf3d.parallel.short_attention import KEYS, ShortAttention
from rlhf3d.parallel.tree_attention import TreeParams, attend_along_tree


class SDPACoreAttention(MegatronModule):
    """Drop-in for Megatron's `DotProductAttention`, which is 3.4x slower at 2,048 tokens.

    Shapes: s sequence, b batch, t packed tokens (of this context-parallel rank), h query heads and
    g key/value heads of this rank, d head. Raises ValueError for what it does not compute: dropout,
    masks other than causal.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(
                f"attention_dropout={dropout}: set it to 0, policy ratios need repeatable log-probs"
            )
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(
                f"attn_mask_type={attn_mask_type}: the CPU platform supports causal attention"
            )
        self.softmax_scale = (
            1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        )
        self.cp = config.context_parallel_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h*d].

        Packed (`qkv_format="thd"`): query [t, h, d], key and value [t, g, d] -> [t, h*d], sequence
        by sequence. A tree of sequences (`TreeParams`) is one line of tokens, b = 1.
        """
        assert attention_mask is None and attention_bias is None, (
            "only the causal mask is supported"
        )
        if packed_seq_params is None:
            return self._over_sequences(query, key, value, [0, query.shape[0] * self.cp])
        if isinstance(packed_seq_params, TreeParams):
            return attend_along_tree(
                query, key, value, packed_seq_params.segments, self.softmax_scale
            )
        ends = packed_seq_params.cu_seqlens_q.tolist()
        assert ends[-1] == query.shape[0] * self.cp, (
            f"packed sequences end at {ends[-1]} of {query.shape[0]} tokens"
        )
        # Packed tokens are a batch of one: [t, 1, h, d].
        return self._over_sequences(query[:, None], key[:, None], value[:, None], ends)[:, 0]

    def _over_sequences(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int]
    ) -> torch.Tensor:
        """[s, b, h, d] with g key/value heads -> [s, b, h*d]; `ends` of the sequences along s."""
        rank = 0
        if self.cp > 1:
            group = parallel_state.get_context_parallel_group()
            rank = group.rank()
            order = gathered_order(ends, self.cp)
            key, value = _gather(key, group, order), _gather(value, group, order)
        parts, done = [], 0
        for chunk in held_chunks(ends, self.cp, rank):
            size = chunk.stop - chunk.start
            own = query[done : done + size]
            # Causal: a query sees its sequence up to its own position, and nothing of others.
            seen = slice(chunk.sequence, chunk.stop)
            heads_first = [x.permute(1, 2, 0, 3) for x in (own, key[seen], value[seen])]
            parts.append(self._attend(*heads_first))
            done += size
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # [b, h, s, d]
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries [b, h, q, d], the last q of k key positions, with g key heads -> [b, h, q, d]."""
        grouped = query.shape[1] != key.shape[1]
        q, k = query.shape[2], key.shape[2]
        if q == k <= KEYS and query.dtype == torch.bfloat16:
            out: torch.Tensor = ShortAttention.apply(query, key, value, self.softmax_scale)
            return out
        # is_causal would align the mask to the first keys; these queries are the last positions.
        mask = None if q == k else torch.ones(q, k, dtype=torch.bool).tril(k - q)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )


def _gather(x: torch.Tensor, group: Any, order: torch.Tensor) -> torch.Tensor:
    """Keys or values [s / cp, …] of all context-parallel ranks, in order of position [s, …]."""
    return gather_from_sequence_parallel_region(x.contiguous(), group=group).index_select(0, order)
