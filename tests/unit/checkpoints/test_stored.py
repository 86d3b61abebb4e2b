"""Stored models: any layout's checkpoint gives back every tensor; differences are listed."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import write_megatron_folder
from support.weights import LLAMA, QWEN3_MOE, Pair, numbered_tensors, pairs

from rlhf3d.checkpoints.convert import MegatronSource
from rlhf3d.checkpoints.stored import KeyStyle, differences, key_style, stored_model
from rlhf3d.checkpoints.torch_dist import Block, TorchDistReader, write_folder
from rlhf3d.parallel.layout import ParallelLayout

STACKED, OWN_LAYERS, ALL_OWN = KeyStyle(), KeyStyle(layers=True), KeyStyle(True, True, True)


@settings(deadline=None, max_examples=40)
@given(pairs(), st.sampled_from([STACKED, OWN_LAYERS, ALL_OWN]))
def test_a_checkpoint_of_any_layout_and_style_gives_every_tensor(
    pair: Pair, style: KeyStyle
) -> None:
    tensors = numbered_tensors(pair.spec)
    with tempfile.TemporaryDirectory() as root:
        place = (tensors, pair.spec, pair.layout)
        folder = write_megatron_folder(Path(root) / "m", *place, prefix="module.", style=style)
        source = MegatronSource(folder, pair.spec)
        found = dict(source.tensors())
        assert source.role == "actor" and set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), name


def test_keys_by_hand() -> None:
    """As megatron-core 0.16 names them: stacked over layers, experts over layers and experts."""
    dense, sparse = stored_model(LLAMA, "value"), stored_model(QWEN3_MOE, "lm")
    assert dense.shapes["decoder.layers.mlp.linear_fc1.weight"] == (4, 48, 8)
    assert dense.shapes["decoder.layers.self_attention.linear_qkv.layer_norm_weight"] == (4, 8)
    assert dense.shapes["value_head.weight"] == (1, 8) and "output_layer.weight" not in dense.shapes
    assert sparse.shapes["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == (2, 4, 8, 12)
    assert sparse.shapes["decoder.layers.pre_mlp_layernorm.weight"] == (2, 8)
    assert (
        "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.3_2.4"
        in sparse.extra_states()
    )
    assert (
        "decoder.layers.self_attention.linear_proj._extra_state/shard_3_4" in dense.extra_states()
    )
    assert (
        "decoder.layers.self_attention.q_layernorm._extra_state/shard_0_2" in sparse.extra_states()
    )
    assert "decoder.final_layernorm._extra_state/shard_0_1" in sparse.extra_states()
    assert len(sparse.extra_states()) == 1 + 2 * (2 + 3 + 2 * 4)


def test_keys_of_their_own_by_hand() -> None:
    """As megatron-core names them with singleton_local_shards, the default of Megatron-LM's
    trainer since 0.15.
    """
    dense, sparse = stored_model(LLAMA, "lm", ALL_OWN), stored_model(QWEN3_MOE, "lm", ALL_OWN)
    assert dense.shapes["decoder.layers.3.mlp.linear_fc1.weight_w"] == (24, 8)
    assert dense.shapes["decoder.layers.3.mlp.linear_fc1.weight_v"] == (24, 8)
    assert dense.shapes["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"] == (8,)
    assert "decoder.layers.mlp.linear_fc1.weight" not in dense.shapes
    experts = "decoder.layers.1.mlp.experts.experts.3"
    assert (
        sparse.shapes[f"{experts}.linear_fc1.weight_v"]
        == sparse.shapes[f"{experts}.linear_fc1.weight_w"]
    )
    assert sparse.shapes[f"{experts}.linear_fc2.weight"] == (8, 12)
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    (slab,) = (slab for slab in sparse.slabs if up in {piece.hf_name for piece in slab.pieces})
    assert slab.key == f"{experts}.linear_fc1.weight_v"
    for style in (STACKED, OWN_LAYERS, ALL_OWN):
        assert key_style(stored_model(QWEN3_MOE, "lm", style).shapes) == style


def test_differences_lists_all() -> None:
    wanted = {"a": (2, 3), "b": (1,), "output_layer.weight": (5, 4)}
    assert differences(wanted, wanted | {"output_layer.weight": (8, 4)}) == []
    assert differences(wanted, {"a": (3, 2), "c": (1,), "output_layer.weight": (4, 4)}) == [
        "missing: b [1]",
        "extra: c [1]",
        "misshapen: a is [3, 2], the model's is [2, 3]",
        "misshapen: output_layer.weight is [4, 4], the model's is [5, 4]",
    ]


def test_rows_beyond_the_vocabulary_are_left_out_with_a_note(tmp_path: Path) -> None:
    """A Megatron trainer never zeroes its padding."""
    tensors = numbered_tensors(LLAMA)
    folder = write_megatron_folder(tmp_path / "m", tensors, LLAMA, ParallelLayout())
    smaller = replace(LLAMA, vocab_size=LLAMA.vocab_size - 2)
    source = MegatronSource(folder, smaller)
    embedding = dict(source.tensors())["model.embed_tokens.weight"]
    assert embedding.shape == (68, 8)
    assert torch.equal(embedding, tensors["model.embed_tokens.weight"][:68])
    assert "left out 2 rows of embedding.word_embeddings.weight" in source.notes[0]
    assert MegatronSource(folder, LLAMA).notes == ()


def test_an_optimizer_s_tensors_are_no_weights(tmp_path: Path) -> None:
    """Those of one of several optimizers (a mixture of experts has two) have a number."""
    keys = ("chained_1.optimizer.state.exp_avg.x", "optimizer.state.exp_avg.x", "optimizer_of_mine")
    blocks = [Block(key, ((0, 3),), torch.float32, (3,)) for key in keys]
    write_folder(tmp_path / "m", [blocks], lambda block: torch.zeros(3))
    assert TorchDistReader(tmp_path / "m").weight_keys() == ["optimizer_of_mine"]
