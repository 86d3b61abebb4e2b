"""Llama 2 and 3, and what is published as such: SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama."""

from __future__ import annotations

from rlhf3d.models.family import Family, WeightNames

NAMES = WeightNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    lm_head="lm_head.weight",
    value_head="score.weight",
    input_norm="model.layers.{layer}.input_layernorm.weight",
    post_attention_norm="model.layers.{layer}.post_attention_layernorm.weight",
    query="model.layers.{layer}.self_attn.q_proj.weight",
    key="model.layers.{layer}.self_attn.k_proj.weight",
    value="model.layers.{layer}.self_attn.v_proj.weight",
    attention_output="model.layers.{layer}.self_attn.o_proj.weight",
    gate="model.layers.{layer}.mlp.gate_proj.weight",
    up="model.layers.{layer}.mlp.up_proj.weight",
    down="model.layers.{layer}.mlp.down_proj.weight",
)

FAMILY = Family(
    model_type="llama",
    names=NAMES,
    required={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # vLLM reads it as attention_bias; transformers' Llama does not know it.
        "bias": False,
        "sliding_window": None,
    },
    heads_divide_hidden=True,
)
