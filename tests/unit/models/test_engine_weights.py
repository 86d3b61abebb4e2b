"""vLLM's weight table: what the ranks hold together is every Hugging Face tensor, cut as vLLM cuts it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.models.engine_weights import check_engine_layout, engine_params, padded_vocab_size
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import LocalParam, box_slices, hf_tensors

SMALL = ModelSpec("llama", 2, 4, num_heads=4, num_kv_heads=2, head_dim=1, ffn_size=6, vocab_size=8)


@st.composite
def specs_and_sizes(draw: st.DrawFn) -> tuple[ModelSpec, int]:
    """Small legal combinations; key-value heads both more and fewer than the ranks."""
    tp = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    spec = ModelSpec(
        family=family,
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 5)),
        num_heads=math.lcm(tp, kv_heads) * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        ffn_size=tp * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 200)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    return spec, tp


def is_key_or_value(hf_name: str) -> bool:
    return any(f".{kind}_proj." in hf_name for kind in "kv")


def is_vocabulary(param: LocalParam) -> bool:
    return param.name in ("model.embed_tokens.weight", "lm_head.weight")


@settings(deadline=None)
@given(specs_and_sizes())
def test_pieces_of_all_ranks_tile_every_tensor(case: tuple[ModelSpec, int]) -> None:
    spec, tp = case
    covered: dict[str, np.ndarray] = {name: np.zeros(shape, int) for name, shape in hf_tensors(spec, "lm").items()}
    for rank in range(tp):
        for param in engine_params(spec, tp, rank):
            for piece in param.pieces:
                covered[piece.hf_name][box_slices(piece.hf_box)] += int(param.primary)
    for name, counts in covered.items():
        copies = max(1, tp // spec.num_kv_heads) if is_key_or_value(name) else 1
        assert (counts == copies).all(), name


@settings(deadline=None)
@given(specs_and_sizes())
def test_pieces_tile_every_parameter_but_the_padding(case: tuple[ModelSpec, int]) -> None:
    spec, tp = case
    names = [[param.name for param in engine_params(spec, tp, rank)] for rank in range(tp)]
    assert all(rank_names == names[0] for rank_names in names)
    assert len(set(names[0])) == len(names[0])
    for rank in range(tp):
        for param in engine_params(spec, tp, rank):
            counts: np.ndarray = np.zeros(param.shape, int)
            for piece in param.pieces:
                volumes = [math.prod(b - a for a, b in box) for box in (piece.hf_box, piece.local_box)]
                assert volumes[0] == volumes[1] > 0
                counts[box_slices(piece.local_box)] += 1
            real = len(counts)
            if is_vocabulary(param):
                real = min(len(counts), max(0, spec.vocab_size - rank * len(counts)))
            assert (counts[:real] == 1).all() and not counts[real:].any(), param.name


@settings(deadline=None)
@given(specs_and_sizes())
def test_a_fused_qkv_serves_its_own_query_heads(case: tuple[ModelSpec, int]) -> None:
    """Each query head's rank holds the key and value head that attention gives it, at the offset vLLM splits at."""
    spec, tp = case
    group = spec.num_heads // spec.num_kv_heads
    for rank in range(tp):
        (qkv, *_) = [p for p in engine_params(spec, tp, rank) if "qkv_proj.weight" in p.name]
        query, key, value = qkv.pieces
        heads = [
            [row // spec.head_dim for row in range(*piece.hf_box[0], spec.head_dim)] for piece in (query, key, value)
        ]
        assert heads[1] == heads[2]
        local_group = len(heads[0]) // len(heads[1])
        for i, head in enumerate(heads[0]):
            assert heads[1][i // local_group] == head // group
        assert [piece.local_box[0] for piece in qkv.pieces] == [
            (0, query.hf_box[0][1] - query.hf_box[0][0]),
            (query.local_box[0][1], query.local_box[0][1] + len(heads[1]) * spec.head_dim),
            (key.local_box[0][1], qkv.shape[0]),
        ]


def test_forward_order_and_shapes_by_hand() -> None:
    qwen2 = replace(SMALL, family="qwen2", qkv_bias=True)
    params = engine_params(qwen2, tp_size=2, tp_rank=1)
    layer = [(p.name.removeprefix("model.layers.0."), p.shape, p.primary, p.tp_dim) for p in params[1:8]]
    assert layer == [
        ("input_layernorm.weight", (4,), False, None),
        ("self_attn.qkv_proj.weight", (4, 4), True, 0),
        ("self_attn.qkv_proj.bias", (4,), True, 0),
        ("self_attn.o_proj.weight", (4, 2), True, 1),
        ("post_attention_layernorm.weight", (4,), False, None),
        ("mlp.gate_up_proj.weight", (6, 4), True, 0),
        ("mlp.down_proj.weight", (4, 3), True, 1),
    ]
    assert [p.name for p in (params[0], *params[-2:])] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert [(p.hf_name.split(".")[-2], p.hf_box, p.local_box[0]) for p in params[2].pieces] == [
        ("q_proj", ((2, 4), (0, 4)), (0, 2)),
        ("k_proj", ((1, 2), (0, 4)), (2, 3)),
        ("v_proj", ((1, 2), (0, 4)), (3, 4)),
    ]
    assert params[7].pieces[0].hf_box == ((0, 4), (3, 6))


def test_vocabulary_is_padded_and_a_tied_head_has_no_entry() -> None:
    spec = replace(SMALL, vocab_size=70, ffn_size=4)
    assert padded_vocab_size(70) == 128 and padded_vocab_size(64) == 64
    boxes = []
    for rank in range(4):
        embedding = engine_params(spec, 4, rank)[0]
        assert embedding.shape == (32, 4)
        boxes.append([(piece.hf_box[0], piece.local_box[0]) for piece in embedding.pieces])
    assert boxes == [[((0, 32), (0, 32))], [((32, 64), (0, 32))], [((64, 70), (0, 6))], []]
    tied = engine_params(replace(spec, tie_embeddings=True), 1, 0)
    assert "lm_head.weight" not in {p.name for p in tied}


@pytest.mark.parametrize(
    ("spec", "tp", "message"),
    [
        (SMALL, 4, r"intermediate_size 6 % 4 = 2\. Nearest legal: 2$"),
        (
            SMALL,
            3,
            r"rollout\.tensor_parallel_size 3 does not fit .* num_attention_heads 4 % 3 = 1; "
            r"vocab_size 8 padded to 64 % 3 = 1; num_key_value_heads 2 % 3 = 2 and 3 % 2 = 1 .* Nearest legal: 2$",
        ),
        (
            replace(SMALL, num_heads=12, num_kv_heads=3, vocab_size=190, ffn_size=12),
            2,
            r"num_key_value_heads 3 % 2 = 1 and 2 % 3 = 2 .* Nearest legal: 1 or 3$",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_arithmetic(spec: ModelSpec, tp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_engine_layout(spec, tp)
    with pytest.raises(ValueError, match=message):
        engine_params(spec, tp, 0)
