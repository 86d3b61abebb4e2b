"""Reading config.json: both generations of transformers, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.models.spec import Llama3RopeScaling, ModelSpec, check_layout, load_spec
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
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.num_kv_heads, qwen2.head_dim) == (True, False, 9, 64)
    qwen3 = load_spec(write(tmp_path, model_type="qwen3", head_dim=128))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2'; supported are llama, mixtral, qwen2, qwen3, qwen3_moe"),
        ({"attention_bias": True}, r"attention_bias=True; llama is supported with attention_bias=False only"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, r"use_sliding_window=True"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"rope type 'yarn'; supported are default and",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"quantization_config": {"bits": 4}}, r"quantised"),
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
    with pytest.raises(ValueError, match=r"model\.path: .* has no \*\.safetensors"):
        load_spec(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"only as pickles \(pytorch_model\.bin\).*save_pretrained"):
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
    with pytest.raises(ValueError, match=r"key_value_heads 3 % tp 5 = 3; intermediate_size 1536 % tp 5 = 1\. "):
        check_layout(spec, ParallelLayout(tp=5))
    with pytest.raises(ValueError, match=r"30 % \(pp 2 x vpp 2\) = 2\. Nearest legal: pp x vpp 3 or 5"):
        check_layout(spec, ParallelLayout(pp=2, vpp=2))
    with pytest.raises(ValueError, match=r"vpp 2 with pp 1"):
        check_layout(spec, ParallelLayout(vpp=2))
