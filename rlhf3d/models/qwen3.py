"""Qwen3 (dense): Llama's names, with RMSNorm on each head's query and key."""

from __future__ import annotations

from dataclasses import replace

from rlhf3d.models.family import Family
from rlhf3d.models.llama import NAMES

FAMILY = Family(
    model_type="qwen3",
    names=replace(
        NAMES,
        query_norm="model.layers.{layer}.self_attn.q_norm.weight",
        key_norm="model.layers.{layer}.self_attn.k_norm.weight",
    ),
    required={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    qk_norm=True,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
