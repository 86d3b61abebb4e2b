"""vLLM's weight table: what the ranks hold together is every Hugging Face tensor, cut as vLLM cuts
it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.models.boxes import box_slices
from rlhf3d.models.engine_weights import (
    check_engine_layout,
    check_quantization,
    engine_params,
    engine_vocab_size,
)
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import LocalParam, hf_tensors

SMALL = ModelSpec("llama", 2, 4, num_heads=4, num_kv_heads=2, head_dim=1, ffn_size=6, vocab_size=8)
EXPERTS = replace(
    SMALL, family="qwen3_moe", qk_norm=True, num_experts=6, experts_per_token=2, moe_ffn_size=4
)

Case = tuple[ModelSpec, int, bool]
"""A model, the number of ranks, and whether experts are whole on their rank."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small legal combinations; key-value heads both more and fewer than the ranks."""
    tp = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"]))
    sparse = family in ("mixtral", "qwen3_moe")
    expert_parallel = sparse and draw(st.booleans())
    spec = ModelSpec(
        family=family,
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 5)),
        num_heads=math.lcm(tp, kv_heads) * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        ffn_size=1 if sparse else tp * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 200)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        num_experts=sparse * (tp if expert_parallel else 1) * draw(st.integers(1, 3)),
        moe_ffn_size=sparse * (1 if expert_parallel else tp) * draw(st.integers(1, 4)),
    )
    return spec, tp, expert_parallel


def is_key_or_value(hf_name: str) -> bool:
    return any(f".{kind}_proj." in hf_name for kind in "kv")


def is_vocabulary(param: LocalParam) -> bool:
    return param.name in ("model.embed_tokens.weight", "lm_head.weight")


@settings(deadline=None)
@given(cases())
def test_pieces_of_all_ranks_tile_every_tensor(case: Case) -> None:
    spec, tp, expert_parallel = case
    covered: dict[str, np.ndarray] = {
        name: np.zeros(shape, int) for name, shape in hf_tensors(spec, "lm").items()
    }
    for rank in range(tp):
        for param in engine_params(spec, tp, rank, expert_parallel):
            for piece in param.pieces:
                covered[piece.hf_name][box_slices(piece.hf_box)] += int(param.primary)
    for name, counts in covered.items():
        copies = max(1, tp // spec.num_kv_heads) if is_key_or_value(name) else 1
        assert (counts == copies).all(), name


@settings(deadline=None)
@given(cases())
def test_pieces_tile_every_parameter_but_the_padding(case: Case) -> None:
    spec, tp, expert_parallel = case
    names = [
        [param.name for param in engine_params(spec, tp, rank, expert_parallel)]
        for rank in range(tp)
    ]
    assert all(rank_names == names[0] for rank_names in names)
    assert len(set(names[0])) == len(names[0])
    for rank in range(tp):
        for param in engine_params(spec, tp, rank, expert_parallel):
            counts: np.ndarray = np.zeros(param.shape, int)
            for piece in param.pieces:
                volumes = [
                    math.prod(b - a for a, b in box) for box in (piece.hf_box, piece.local_box)
                ]
                assert volumes[0] == volumes[1] > 0
                counts[box_slices(piece.local_box)] += 1
            real = len(counts)
            if is_vocabulary(param):
                real = min(len(counts), max(0, spec.vocab_size - rank * len(counts)))
            assert (counts[:real] == 1).all() and not counts[real:].any(), param.name


@settings(deadline=None)
@given(cases())
def test_a_fused_qkv_serves_its_own_query_heads(case: Case) -> None:
    """Each query head's rank holds the key and value head that attention gives it, at the offset
    vLLM splits at.
    """
    spec, tp, expert_parallel = case
    group = spec.num_heads // spec.num_kv_heads
    for rank in range(tp):
        (qkv, *_) = [
            p for p in engine_params(spec, tp, rank, expert_parallel) if "qkv_proj.weight" in p.name
        ]
        query, key, value = qkv.pieces
        heads = [
            [row // spec.head_dim for row in range(*piece.hf_box[0], spec.head_dim)]
            for piece in (query, key, value)
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
    layer = [
        (p.name.removeprefix("model.layers.0."), p.shape, p.primary, p.tp_dim) for p in params[1:8]
    ]
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


def test_experts_are_cut_or_whole() -> None:
    """Rank 1 of 2: half of each of six experts, or experts 3, 4 and 5."""
    cut = {p.name: p for p in engine_params(EXPERTS, 2, 1)}
    whole = {p.name: p for p in engine_params(EXPERTS, 2, 1, expert_parallel=True)}
    w13, w2 = (f"model.layers.1.mlp.experts.routed_experts.{leaf}_weight" for leaf in ("w13", "w2"))
    assert (cut[w13].shape, cut[w2].shape) == ((6, 4, 4), (6, 4, 2))
    assert (whole[w13].shape, whole[w2].shape) == ((3, 8, 4), (3, 4, 4))
    assert [(p.hf_name, p.hf_box[0], p.local_box[:2]) for p in cut[w13].pieces[6:8]] == [
        ("model.layers.1.mlp.experts.3.gate_proj.weight", (2, 4), ((3, 4), (0, 2))),
        ("model.layers.1.mlp.experts.3.up_proj.weight", (2, 4), ((3, 4), (2, 4))),
    ]
    assert [(p.hf_name, p.hf_box[0], p.local_box[:2]) for p in whole[w13].pieces[:2]] == [
        ("model.layers.1.mlp.experts.3.gate_proj.weight", (0, 4), ((0, 1), (0, 4))),
        ("model.layers.1.mlp.experts.3.up_proj.weight", (0, 4), ((0, 1), (4, 8))),
    ]
    assert cut[w2].pieces[3].hf_box == ((0, 4), (2, 4)) and whole[w2].pieces[0].hf_name.endswith(
        "3.down_proj.weight"
    )
    router = cut["model.layers.0.mlp.gate.weight"]
    assert router.shape == (6, 4) and not router.primary
    mixtral = engine_params(replace(EXPERTS, family="mixtral", qk_norm=False), 1, 0)
    assert "model.layers.0.block_sparse_moe.experts.routed_experts.w2_weight" in {
        p.name for p in mixtral
    }


def test_vocabulary_is_padded_and_a_tied_head_has_no_entry() -> None:
    spec = replace(SMALL, vocab_size=70, ffn_size=4)
    assert engine_vocab_size(70) == 128 and engine_vocab_size(64) == 64
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
            r"vocab_size 8 padded to 64 % 3 = 1; num_key_value_heads 2 % 3 = 2 and 3 % 2 = 1 "
            r".* Nearest legal: 2$",
        ),
        (
            replace(SMALL, num_heads=12, num_kv_heads=3, vocab_size=190, ffn_size=12),
            2,
            r"num_key_value_heads 3 % 2 = 1 and 2 % 3 = 2 .* Nearest legal: 1 or 3$",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_arithmetic(
    spec: ModelSpec, tp: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_engine_layout(spec, tp)
    with pytest.raises(ValueError, match=message):
        engine_params(spec, tp, 0)


def test_experts_that_do_not_fit_are_refused() -> None:
    spec = replace(EXPERTS, moe_ffn_size=3, ffn_size=5)
    with pytest.raises(
        ValueError, match=r"size 2 .*: intermediate_size of an expert 3 % 2 = 1\. Nearest legal: 1$"
    ):
        check_engine_layout(spec, 2)
    check_engine_layout(spec, 2, expert_parallel=True)
    with pytest.raises(ValueError, match=r"size 4 .*: num_experts 6 % 4 = 2\. Nearest legal: 2$"):
        check_engine_layout(spec, 4, expert_parallel=True)
    with pytest.raises(ValueError, match=r"rollout\.expert_parallel true: the model is dense"):
        check_engine_layout(SMALL, 2, expert_parallel=True)


def test_experts_are_not_quantized() -> None:
    check_quantization(EXPERTS, "none")
    check_quantization(SMALL, "fp8_per_channel")
    with pytest.raises(
        ValueError, match=r"rollout\.quantization = fp8_per_channel: the model has experts"
    ):
        check_quantization(EXPERTS, "fp8_per_channel")
