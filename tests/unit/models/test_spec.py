"""Reading config.json: both generations of transformers, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.models.hf_config import Llama3RopeScaling
from rlhf3d.models.spec import ModelSpec, check_layout, load_spec, padded_vocab_size
from rlhf3d.parallel.layout import ParallelLayout

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, weights: str = "model.safetensors", **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    (folder / weights).touch()
    return folder


def test_smollm2(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, rope_theta=1e5))
    assert spec == ModelSpec(
        family="llama",
        num_layers=30,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        ffn_size=1536,
        vocab_size=49152,
        rms_eps=1e-5,
        rope_theta=1e5,
        max_position=8192,
        tie_embeddings=True,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
    ],
    ids=["transformers-4", "transformers-4-old-key", "transformers-5"],
)
def test_llama3_rope(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = load_spec(write(tmp_path, **changes))
    assert spec.rope_theta == 5e5
    assert spec.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)


def test_families(tmp_path: Path) -> None:
    qwen2 = load_spec(write(tmp_path, model_type="qwen2", head_dim=None, num_key_value_heads=None))
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.num_kv_heads, qwen2.head_dim) == (
        True,
        False,
        9,
        64,
    )
    qwen3 = load_spec(write(tmp_path, model_type="qwen3", head_dim=128))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def test_mixtures_of_experts(tmp_path: Path) -> None:
    mixtral = load_spec(write(tmp_path, **MIXTRAL))
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.moe_ffn_size) == (8, 2, 1536)
    assert mixtral.norm_topk_prob and not mixtral.qk_norm and mixtral.rope_theta == 1e6
    for renamed in (
        {},
        {"num_experts": None, "num_local_experts": 128},
    ):  # as published; as transformers 5 writes
        qwen = load_spec(write(tmp_path, **QWEN3_MOE | renamed))
        assert (qwen.num_experts, qwen.experts_per_token, qwen.moe_ffn_size) == (128, 8, 768)
        assert qwen.norm_topk_prob and qwen.qk_norm
    silent = {key: value for key, value in QWEN3_MOE.items() if key != "norm_topk_prob"}
    assert not load_spec(write(tmp_path, **silent)).norm_topk_prob
    assert load_spec(write(tmp_path)).num_experts == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            MIXTRAL | {"sliding_window": 4096},
            r"sliding_window=4096; mixtral is supported with sliding_window=None",
        ),
        (MIXTRAL | {"num_local_experts": None}, r"lacks num_local_experts;"),
        (MIXTRAL | {"num_experts_per_tok": 9}, r"num_experts_per_tok=9 of 8 experts"),
        (
            MIXTRAL | {"num_experts_per_tok": 1},
            r"num_experts_per_tok=1 with probabilities scaled to sum to 1",
        ),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, r"decoder_sparse_step=2"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        (
            QWEN3_MOE | {"shared_expert_intermediate_size": 64},
            r"shared_expert_intermediate_size=64",
        ),
        (QWEN3_MOE | {"moe_intermediate_size": None}, r"lacks moe_intermediate_size;"),
        (
            {"model_type": "gpt2"},
            r"model_type 'gpt2'; supported are llama, mixtral, qwen2, qwen3, qwen3_moe",
        ),
        (
            {"attention_bias": True},
            r"attention_bias=True; llama is supported with attention_bias=False only",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, r"use_sliding_window=True"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            r"rope type 'longrope'; supported are default, llama3 and yarn",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"quantization_config": {"bits": 4}}, r"quantized"),
        ({"vocab_size": None}, r"lacks vocab_size"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_refuses_other_architectures(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.path: .*{message}"):
        load_spec(write(tmp_path, **changes))


def test_refuses_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path: no folder .*hf download"):
        load_spec(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"model\.path: .* has no config\.json"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=r"model\.path: .* has no model\.safetensors"):
        load_spec(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        ValueError, match=r"only as pickles \(pytorch_model\.bin\).*save_pretrained"
    ):
        load_spec(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON"):
        load_spec(tmp_path)


def test_check_layout_lists_every_violation_with_the_nearest_legal_sizes(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path))
    check_layout(spec, ParallelLayout(tp=3, pp=2, dp=5))
    check_layout(spec, ParallelLayout(tp=1, pp=3, vpp=2))
    with pytest.raises(ValueError) as error:
        check_layout(spec, ParallelLayout(tp=2, pp=4))
    assert str(error.value) == (
        "layout: TP2×PP4×DP1 does not fit this model: num_attention_heads 9 % tp 2 = 1; "
        "num_key_value_heads 3 % tp 2 = 1; num_hidden_layers 30 % pp 4 = 2. "
        "Nearest legal: tp 1 or 3; pp 3 or 5"
    )
    with pytest.raises(
        ValueError, match=r"key_value_heads 3 % tp 5 = 3; intermediate_size 1536 % tp 5 = 1\. "
    ):
        check_layout(spec, ParallelLayout(tp=5))
    with pytest.raises(
        ValueError, match=r"30 % \(pp 2 x vpp 2\) = 2\. Nearest legal: pp x vpp 3 or 5"
    ):
        check_layout(spec, ParallelLayout(pp=2, vpp=2))
    with pytest.raises(ValueError, match=r"vpp 2 with pp 1"):
        check_layout(spec, ParallelLayout(vpp=2))
    check_layout(spec, ParallelLayout(pp=4, first_stage_layers=6, last_stage_layers=8))
    with pytest.raises(
        ValueError,
        match=r"30 - first 6 - last 9 = 15 layers for the other 2 of pp 4\. "
        r".*leave all other stages the same",
    ):
        check_layout(spec, ParallelLayout(pp=4, first_stage_layers=6, last_stage_layers=9))


def test_check_layout_of_experts(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, **MIXTRAL))
    check_layout(spec, ParallelLayout(tp=3, dp=8, ep=8))
    with pytest.raises(ValueError, match=r"num_experts 8 % ep 3 = 2\. Nearest legal: ep 1$"):
        check_layout(spec, ParallelLayout(tp=3, ep=3))
    with pytest.raises(ValueError, match=r"\(tp 3 x dp 4\) % ep 8 = 4\. Nearest legal: ep 4$"):
        check_layout(spec, ParallelLayout(tp=3, dp=4, ep=8))
    with pytest.raises(ValueError, match=r"tp 3 without sequence_parallel"):
        check_layout(spec, ParallelLayout(tp=3), sequence_parallel=False)
    with pytest.raises(ValueError, match=r"ep 2, but the model is dense"):
        check_layout(load_spec(write(tmp_path)), ParallelLayout(dp=2, ep=2))


def test_vocabulary_is_padded_to_a_multiple_of_tp(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, vocab_size=100))
    check_layout(spec, ParallelLayout(tp=3))
    assert [padded_vocab_size(spec, ParallelLayout(tp=tp)) for tp in (1, 3)] == [100, 102]
