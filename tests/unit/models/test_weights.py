"""The weight table: pieces tile tensors and parameters exactly once, and copying along them loses
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.models.boxes import box_slices
from rlhf3d.models.spec import FAMILIES, ModelSpec, check_layout
from rlhf3d.models.weights import (
    Head,
    LocalParam,
    check_hf_tensors,
    hf_tensors,
    local_params,
)
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle

HEADS: list[Head] = ["lm", "value", "none"]
STYLES: list[SpecStyle] = ["local", "te"]


@st.composite
def specs_and_layouts(draw: st.DrawFn) -> tuple[ModelSpec, ParallelLayout]:
    """Small legal combinations, head sizes that are not hidden / heads and vocabularies that need
    padding included.
    """
    family = draw(st.sampled_from(sorted(FAMILIES)))
    sparse = FAMILIES[family].experts is not None
    tp, pp, dp, cp = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    vpp = draw(st.integers(1, 2)) if pp > 1 else 1
    stage = tp * dp * cp
    ep = draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0])) if sparse else 1
    first, middle, last = (vpp * draw(st.integers(1, 2)) for _ in range(3))
    has_first, has_last = (draw(st.booleans()), draw(st.booleans())) if pp > 1 else (False, False)
    layers = first * has_first + last * has_last + middle * (pp - has_first - has_last)
    kv_heads = tp * draw(st.integers(1, 2))
    spec = ModelSpec(
        family=family,
        num_layers=layers,
        hidden_size=draw(st.integers(1, 5)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        ffn_size=tp * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 13)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_norm=FAMILIES[family].qk_norm,
        num_experts=ep * draw(st.integers(1, 2)) if sparse else 0,
        moe_ffn_size=draw(st.integers(1, 4)) if sparse else 0,
    )
    layout = ParallelLayout(
        tp, pp, dp, vpp, ep, first if has_first else None, last if has_last else None, cp
    )
    return spec, layout


def all_params(
    spec: ModelSpec, layout: ParallelLayout, head: Head, style: SpecStyle = "local"
) -> Iterator[tuple[int, int, LocalParam]]:
    for rank in range(layout.world_size):
        for chunk in range(layout.vpp):
            for param in local_params(spec, layout, layout.coords(rank), chunk, head, style):
                yield rank, chunk, param


def real_rows(spec: ModelSpec, layout: ParallelLayout, rank: int, param: LocalParam) -> int:
    """Rows of a local parameter that are not vocabulary padding."""
    if param.name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return param.shape[0]
    share = math.ceil(spec.vocab_size / layout.tp)
    assert param.shape == (share, spec.hidden_size)
    return max(0, min(share, spec.vocab_size - layout.coords(rank).tp * share))


@settings(deadline=None)
@given(specs_and_layouts(), st.sampled_from(HEADS), st.sampled_from(STYLES))
def test_pieces_tile_tensors_and_parameters_exactly_once(
    case: tuple[ModelSpec, ParallelLayout], head: Head, style: SpecStyle
) -> None:
    spec, layout = case
    check_layout(spec, layout)
    covered: dict[str, np.ndarray] = {
        name: np.zeros(shape, int) for name, shape in hf_tensors(spec, head).items()
    }
    for rank, _, param in all_params(spec, layout, head, style):
        local: np.ndarray = np.zeros(param.shape, int)
        for piece in param.pieces:
            assert [b - a for a, b in piece.hf_box] == [b - a for a, b in piece.local_box]
            local[box_slices(piece.local_box)] += 1
            covered[piece.hf_name][box_slices(piece.hf_box)] += int(param.primary)
        real = real_rows(spec, layout, rank, param)
        assert (local[:real] == 1).all() and not local[real:].any(), param.name
    for name, counts in covered.items():
        assert (counts == 1).all(), name


@settings(deadline=None)
@given(specs_and_layouts(), st.sampled_from(HEADS), st.sampled_from(STYLES))
def test_loading_then_exporting_returns_every_tensor(
    case: tuple[ModelSpec, ParallelLayout], head: Head, style: SpecStyle
) -> None:
    spec, layout = case
    rng = np.random.default_rng(0)
    tensors = {name: rng.random(shape) for name, shape in hf_tensors(spec, head).items()}
    exported = {name: np.full(shape, np.nan) for name, shape in hf_tensors(spec, head).items()}
    replicas: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    for rank, chunk, param in all_params(spec, layout, head, style):
        local = np.zeros(param.shape)
        for piece in param.pieces:
            local[box_slices(piece.local_box)] = tensors[piece.hf_name][box_slices(piece.hf_box)]
        coords = layout.coords(rank)
        shard = (coords.pp, chunk, coords.ep if param.expert else coords.tp)
        replica = replicas.setdefault(shard, {}).setdefault(param.name, local)
        assert np.array_equal(replica, local), f"replicas of {param.name} hold the same weights"
        if param.primary:
            for piece in param.pieces:
                exported[piece.hf_name][box_slices(piece.hf_box)] = local[
                    box_slices(piece.local_box)
                ]
    for name, tensor in tensors.items():
        assert exported[name].tobytes() == tensor.tobytes(), name


SMALL = ModelSpec("llama", 2, 4, num_heads=4, num_kv_heads=2, head_dim=1, ffn_size=6, vocab_size=8)


def test_fused_rows_by_hand() -> None:
    """Two KV groups on two ranks: rank 1 has query heads 2 and 3, KV head 1, half of gate and
    up.
    """
    layout = ParallelLayout(tp=2)
    params = {p.name: p for p in local_params(SMALL, layout, layout.coords(1))}
    qkv = params["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert qkv.shape == (4, 4)
    assert [(p.hf_name.split(".")[-2], p.hf_box[0], p.local_box[0]) for p in qkv.pieces] == [
        ("q_proj", (2, 4), (0, 2)),
        ("k_proj", (1, 2), (2, 3)),
        ("v_proj", (1, 2), (3, 4)),
    ]
    fc1 = params["decoder.layers.1.mlp.linear_fc1.weight"]
    assert [(p.hf_name, p.hf_box[0], p.local_box[0]) for p in fc1.pieces] == [
        ("model.layers.1.mlp.gate_proj.weight", (3, 6), (0, 3)),
        ("model.layers.1.mlp.up_proj.weight", (3, 6), (3, 6)),
    ]
    fc2 = params["decoder.layers.0.mlp.linear_fc2.weight"]
    assert fc2.pieces[0].hf_box == ((0, 4), (3, 6)) and fc2.tp_dim == 1


def test_tied_embeddings_are_copied_to_the_last_stage_and_exported_once() -> None:
    tied = ModelSpec(**{**vars(SMALL), "tie_embeddings": True})
    one, two = ParallelLayout(), ParallelLayout(pp=2)
    assert "output_layer.weight" not in {p.name for p in local_params(tied, one, one.coords(0))}
    (copy,) = [p for p in local_params(tied, two, two.coords(1)) if p.name == "output_layer.weight"]
    assert copy.pieces[0].hf_name == "model.embed_tokens.weight" and not copy.primary
    assert "lm_head.weight" not in hf_tensors(tied, "lm")


def test_check_hf_tensors_names_what_does_not_fit() -> None:
    shapes = hf_tensors(SMALL, "lm")
    check_hf_tensors(
        shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (1,)}, SMALL, "lm", "F"
    )
    check_hf_tensors(
        shapes, SMALL, "value", "F"
    )  # no score.weight yet, and a vocabulary head to ignore
    with pytest.raises(ValueError, match=r"model\.path: F lacks lm_head\.weight"):
        check_hf_tensors(hf_tensors(SMALL, "none"), SMALL, "lm", "F")
    classifier = hf_tensors(
        replace(SMALL, tie_embeddings=True), "value"
    )  # nothing that a tied model needs is missing
    with pytest.raises(
        ValueError, match=r"F is a sequence classifier \(score\.weight\), not a language model"
    ):
        check_hf_tensors(classifier, replace(SMALL, tie_embeddings=True), "lm", "F")
    for rename in (lambda name: f"module.{name}", lambda name: name.removeprefix("model.")):
        renamed = {rename(name): shape for name, shape in shapes.items()}
        with pytest.raises(
            ValueError,
            match=r"F names its embedding .*embed_tokens\.weight, not model\.embed_tokens",
        ):
            check_hf_tensors(renamed, SMALL, "lm", "F")
    with pytest.raises(
        ValueError, match=r"in one tensor \(m\.mlp\.experts\.gate_up_proj\); .*save_pretrained"
    ):
        check_hf_tensors(shapes | {"m.mlp.experts.gate_up_proj": (4,)}, SMALL, "lm", "F")
    with pytest.raises(
        ValueError, match=r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        check_hf_tensors(shapes | {"model.layers.0.self_attn.q_proj.bias": (4,)}, SMALL, "lm", "F")
    with pytest.raises(ValueError, match=r"wrong shapes: model\.norm\.weight \(5,\) for \(4,\)"):
        check_hf_tensors(shapes | {"model.norm.weight": (5,)}, SMALL, "lm", "F")


MOE = ModelSpec(
    "mixtral",
    1,
    4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=1,
    ffn_size=3,
    vocab_size=8,
    num_experts=4,
    moe_ffn_size=3,
)


def test_experts_by_hand() -> None:
    """Two tensor x two data ranks in groups of two: ranks 1 and 3 hold experts 2 and 3, and rank 1
    exports them.
    """
    layout = ParallelLayout(tp=2, dp=2, ep=2)
    one, three = (
        {p.name: p for p in local_params(MOE, layout, layout.coords(rank))} for rank in (1, 3)
    )
    experts = "decoder.layers.0.mlp.experts.local_experts"
    fc1 = one[f"{experts}.1.linear_fc1.weight"]
    assert fc1.shape == (6, 4) and fc1.expert and fc1.tp_dim is None
    assert [(p.hf_name, p.hf_box, p.local_box[0]) for p in fc1.pieces] == [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", ((0, 3), (0, 4)), (0, 3)),
        ("model.layers.0.block_sparse_moe.experts.3.w3.weight", ((0, 3), (0, 4)), (3, 6)),
    ]
    fc2 = one[f"{experts}.0.linear_fc2.weight"]
    assert fc2.shape == (4, 3)
    assert [p.hf_name for p in fc2.pieces] == [
        "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    ]
    assert fc1.primary and not three[f"{experts}.1.linear_fc1.weight"].primary
    router = one["decoder.layers.0.mlp.router.weight"]
    assert router.shape == (4, 4) and not router.expert and not router.primary


def test_transformer_engine_names_experts_as_one_group() -> None:
    layout = ParallelLayout(dp=2, ep=2)
    names = {
        p.name.removeprefix("decoder.layers.0.")
        for p in local_params(MOE, layout, layout.coords(1), 0, "lm", "te")
    }
    assert {
        f"mlp.experts.linear_fc{n}.weight{expert}" for n in (1, 2) for expert in (0, 1)
    } <= names
    assert {"pre_mlp_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"} <= names
    assert not any(name.startswith("mlp.linear_fc") for name in names)


def test_vocabulary_padding_by_hand() -> None:
    """Five rows over four ranks, two each: the third rank has one, the fourth none."""
    spec = ModelSpec(**{**vars(SMALL), "num_kv_heads": 4, "vocab_size": 5})
    layout = ParallelLayout(tp=4)
    params = [
        p
        for rank in range(4)
        for p in local_params(spec, layout, layout.coords(rank))
        if "word" in p.name
    ]
    assert [p.shape for p in params] == [(2, 4)] * 4
    assert [[piece.hf_box[0] for piece in p.pieces] for p in params] == [
        [(0, 2)],
        [(2, 4)],
        [(4, 5)],
        [],
    ]
