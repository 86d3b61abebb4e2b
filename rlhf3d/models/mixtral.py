"""Mixtral: Llama's attention, and in every layer experts of which each token takes the best two."""

from __future__ import annotations

from dataclasses import replace

from rlhf3d.models.family import ExpertKeys, Family
from rlhf3d.models.llama import NAMES

FAMILY = Family(
    model_type="mixtral",
    names=replace(
        NAMES,
        router="model.layers.{layer}.block_sparse_moe.gate.weight",
        gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    ),
    # transformers adds router noise in training; vLLM has none.
    required={"hidden_act": "silu", "sliding_window": None, "router_jitter_noise": 0.0},
    defaults={"num_key_value_heads": 8},
    experts=ExpertKeys(
        num_experts=("num_local_experts", "num_experts"),
        experts_per_token="num_experts_per_tok",
        ffn_size="intermediate_size",
        norm_topk_prob=None,
    ),
    default_rope_theta=1000000.0,
)
