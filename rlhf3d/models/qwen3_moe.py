"""Qwen3-MoE: Qwen3's attention, and in every layer many small experts."""

from __future__ import annotations

from dataclasses import replace

from rlhf3d.models import qwen3
from rlhf3d.models.family import ExpertKeys, Family

FAMILY = Family(
    model_type="qwen3_moe",
    names=replace(
        qwen3.FAMILY.names,
        router="model.layers.{layer}.mlp.gate.weight",
        gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    ),
    required={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        # Together: experts in every layer, and no MLP that all tokens share.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "shared_expert_intermediate_size": 0,
    },
    qk_norm=True,
    defaults={"num_key_value_heads": 4},
    experts=ExpertKeys(
        num_experts=("num_experts", "num_local_experts"),
        experts_per_token="num_experts_per_tok",
        ffn_size="moe_intermediate_size",
        norm_topk_prob="norm_topk_prob",
    ),
)
