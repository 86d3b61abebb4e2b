"""What is read from a config.json equals what transformers makes of it, or is refused by name."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rlhf3d.models.hf_config import Llama3RopeScaling, YarnRopeScaling
from rlhf3d.models.spec import FAMILIES, ModelSpec, load_spec

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
ABSENT = "(absent)"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
SMALL_YARN = {
    "rope_type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 64,
    "rope_theta": 1000,
}


def write(folder: Path, family: str = "llama", **changes: Any) -> Path:
    config = {"model_type": family, **SHAPE, **EXPERTS.get(family, {}), **changes}
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v != ABSENT})
    )
    return folder


def read(folder: Path) -> ModelSpec:
    return load_spec(folder, with_weights=False)


def rotary(config: Any) -> Any:
    """transformers' own module of rotary positions, which holds frequencies and the factor of cos
    and sin.
    """
    module = importlib.import_module(
        f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    )
    names = [name for name in vars(module) if name.endswith("RotaryEmbedding")]
    return getattr(module, names[0])(config)


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 1e6},
    {"rope_theta": 1000000, "rope_scaling": None},
    {"rope_scaling": {}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": {}, "rope_theta": 5e5},
    {"rope_parameters": None},
    {"rope_theta": 5e5, "partial_rotary_factor": 1.0},
    {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "llama3", "original_max_position_embeddings": 64, **LLAMA3},
    },
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "original_max_position_embeddings": 64,
            **LLAMA3,
        }
    },
    {"rope_scaling": {"type": "yarn", **YARN}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
    {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "type": "yarn", **YARN}},
    {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 2.5}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    {"rope_parameters": {"rope_type": "yarn", **YARN}, "rope_theta": 1e6},
    {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"rope_type": "yarn", **YARN},
        "rope_theta": 1e4,
    },
    {
        "rope_parameters": {"rope_type": "default"},
        "rope_scaling": {"type": "yarn", **YARN},
        "rope_theta": 1e6,
    },
    {"rope_parameters": {"rope_type": "yarn", **YARN}, "rope_scaling": {}, "rope_theta": 1e6},
    {
        "rope_parameters": {"rope_type": "yarn", **YARN},
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 1e6,
    },
    {"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 128},
    {
        "rope_scaling": {
            "rope_type": "yarn",
            **YARN,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        }
    },
    {"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 1.5}},
    {
        "rope_scaling": {
            "rope_type": "yarn",
            **YARN,
            "attention_factor": None,
            "mscale": 0.7,
            "mscale_all_dim": 0.5,
        }
    },
    {"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 0.7}},
    {"rope_scaling": {"rope_type": "yarn", **YARN, "factor": 1.0}},
    {"rope_scaling": SMALL_YARN},
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: json.dumps(rope)[:60])
def test_rotary_positions_are_those_of_transformers(
    tmp_path: Path, family: str, rope: dict[str, Any]
) -> None:
    """Frequencies, their factor and base, of every form in which the keys are written."""
    from rlhf3d.models.megatron import yarn_frequencies

    folder = write(tmp_path, family, head_dim=32, **rope)
    spec, config = read(folder), AutoConfig.from_pretrained(folder)
    theirs = rotary(config)
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    frequencies = 1.0 / spec.rope_theta ** (torch.arange(0, 32, 2).float() / 32)
    scaling, factor = spec.rope_scaling, 1.0
    if isinstance(scaling, YarnRopeScaling):
        factor = scaling.attention_factor
        frequencies = yarn_frequencies(frequencies, scaling, spec.rope_theta)
        assert (
            spec.max_position
            == scaling.factor * config.rope_parameters["original_max_position_embeddings"]
        )
    elif isinstance(scaling, Llama3RopeScaling):
        stretched = config.rope_parameters
        assert scaling == Llama3RopeScaling(
            8.0, 1.0, 4.0, stretched["original_max_position_embeddings"]
        )
        frequencies = (
            theirs.inv_freq
        )  # Megatron's; tests/integration/test_parity.py compares the logits
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert (scaling is None) == (config.rope_parameters["rope_type"] == "default")


FORMS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": ABSENT, "num_attention_heads": 32, "hidden_size": 256},
    {"num_key_value_heads": 4},
    {"head_dim": 32},
    {"head_dim": ABSENT},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"sliding_window": None},
    {"quantization_config": None},
    {"rms_norm_eps": 1e-5, "hidden_act": "silu"},
    {"layer_types": ["full_attention"] * 4},
    {"layer_types": None},
    {"torch_dtype": "bfloat16", "architectures": ["X"], "use_cache": False},
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("changes", FORMS, ids=lambda form: str(form)[:60])
def test_shapes_are_those_of_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """Also of keys that are not there, for which each of transformers' classes has a value of its
    own.
    """
    folder = write(tmp_path, family, **changes)
    spec, config = read(folder), AutoConfig.from_pretrained(folder)
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert (spec.num_layers, spec.rms_eps) == (config.num_hidden_layers, config.rms_norm_eps)
    assert not getattr(config, "sliding_window", None)
    if spec.num_experts:
        assert (spec.num_experts, spec.experts_per_token) == (
            config.num_experts,
            config.num_experts_per_tok,
        )
        assert spec.norm_topk_prob == getattr(config, "norm_topk_prob", True)


def test_experts_by_either_key(tmp_path: Path) -> None:
    for family, keys in (
        ("mixtral", ("num_experts",)),
        ("qwen3_moe", ("num_local_experts", "num_experts")),
    ):
        experts = dict.fromkeys(("num_experts", "num_local_experts"), ABSENT) | dict.fromkeys(
            keys, 8
        )
        folder = write(tmp_path, family, **experts)
        assert read(folder).num_experts == AutoConfig.from_pretrained(folder).num_experts == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 4}, r"6 % 4 = 2"),
        ({"num_attention_heads": 6}, r"hidden_size=64 and num_attention_heads=6: 64 % 6 = 4"),
        ({"num_attention_heads": 6, "head_dim": 16, "num_key_value_heads": 3}, r"64 % 6 = 4"),
        ({"head_dim": 15}, r"heads of 15, which rotary positions cannot halve"),
        (
            {"num_attention_heads": "4"},
            r"num_attention_heads='4' in config\.json; it must be a whole number",
        ),
        (
            {"num_hidden_layers": 4.0},
            r"num_hidden_layers=4\.0 in config\.json; it must be a whole number",
        ),
        ({"num_hidden_layers": True}, r"num_hidden_layers=True"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0"),
        ({"vocab_size": -1}, r"vocab_size=-1"),
        ({"vocab_size": None}, r"lacks vocab_size"),
        ({"head_dim": "16"}, r"head_dim='16'"),
        ({"num_key_value_heads": [2]}, r"num_key_value_heads=\[2\]"),
        (
            {"rms_norm_eps": "1e-05"},
            r"rms_norm_eps='1e-05' in config\.json; it must be a number above 0",
        ),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps=nan"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps=0"),
        ({"max_position_embeddings": 512.5}, r"max_position_embeddings=512\.5"),
        (
            {"tie_word_embeddings": "false"},
            r"tie_word_embeddings='false' in config\.json; it must be true or false",
        ),
        (
            {"attention_bias": 0},
            r"attention_bias=0; llama is supported with attention_bias=False only",
        ),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
        ({"rope_theta": None}, r"lacks rope_theta"),
        ({"rope_theta": 1.0}, r"rope_theta=1\.0 .* above 1"),
        ({"rope_theta": "1e6"}, r"rope_theta='1e6'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
            r"lacks rope_parameters\.rope_theta",
        ),
        (
            {"rope_scaling": "linear"},
            r"rope_scaling='linear' in config\.json; it must be an object",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] in config\.json; it must be an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"rotary positions by kind of layer",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            r"rope type 'linear'; supported are default, ll",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope type 'dynamic'"),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "llama3", **YARN}},
            r"rope_type='llama3' and type='yarn'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, r"lacks rope_scaling\.factor"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": "4"}}, r"rope_scaling\.factor='4'"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "factor": 0.5}},
            r"rope_scaling\.factor=0\.5 .* 1 or more",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "beta_fast": None}},
            r"rope_scaling\.beta_fast=None",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "truncate": 1}},
            r"rope_scaling\.truncate=1 .* true or false",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 64},
            r"=64 .* 128, as for its",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            r"lacks rope_scaling\.low_freq_factor",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "yarn", **YARN}},
            r"rope_theta=1000000\.0 in rope_parameters, which its rope_scaling replaces: "
            r"transformers would take 10000",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            r"layer_types=.* 4 times full_attention",
        ),
        (
            {"transformers_weights": "other.safetensors"},
            r"transformers_weights='other\.safetensors'",
        ),
        ({"logit_scale": 0.5}, r"logit_scale=0\.5"),
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            r"is quantized \(compression_config\)",
        ),
        ({"sliding_window": 128}, r"sliding_window=128"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_refused_by_key_and_value(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.path: .*{message}"):
        read(write(tmp_path, **changes))


def test_experts_are_checked(tmp_path: Path) -> None:
    for changes, message in (
        ({"num_experts_per_tok": 2.0}, r"num_experts_per_tok=2\.0"),
        ({"num_local_experts": 4}, r"num_experts=8 .* must be 4, as num_local_experts"),
        ({"norm_topk_prob": "true"}, r"norm_topk_prob='true'"),
        ({"num_key_value_heads": None}, r"lacks num_key_value_heads"),
        ({"head_dim": None, "moe_intermediate_size": 0}, r"moe_intermediate_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            read(write(tmp_path, "qwen3_moe", **changes))
    with pytest.raises(
        ValueError, match=r"lacks head_dim"
    ):  # where it is absent transformers takes 128
        read(write(tmp_path, "qwen3", head_dim=None))


def test_the_published_recipe_for_qwen(tmp_path: Path) -> None:
    """As Qwen2.5's model card says: max_position_embeddings stays, and the window is four times
    it.
    """
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    spec = read(
        write(
            tmp_path, "qwen2", max_position_embeddings=32768, rope_theta=1e6, rope_scaling=scaling
        )
    )
    assert spec.max_position == 131072 and isinstance(spec.rope_scaling, YarnRopeScaling)
    assert replace(spec.rope_scaling, attention_factor=0) == YarnRopeScaling(4.0, 32768, 0)
    assert spec.rope_scaling.attention_factor == pytest.approx(1.1386, abs=1e-4)
