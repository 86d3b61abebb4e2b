"""Qwen2 and Qwen2.5 (dense): Llama's names, with biases on query, key and value."""

from __future__ import annotations

from rlhf3d.models.family import Family
from rlhf3d.models.llama import NAMES

FAMILY = Family(
    model_type="qwen2",
    names=NAMES,
    required={"hidden_act": "silu", "use_sliding_window": False, "qk_norm": False},
    defaults={"num_key_value_heads": 32},
    qkv_bias=True,
)
