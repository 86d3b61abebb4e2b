"""Stored models: any layout's checkpoint gives back every tensor; differences are listed."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from support.checkpoints import write_megatron_folder
from support.weights import LLAMA, QWEN3_MOE, Pair, numbered_tensors, pairs

from rlhf3d.checkpoints.convert import MegatronSource, MismatchError
from rlhf3d.checkpoints.stored import differences, files_of, stored_model
from rlhf3d.models.boxes import full_box
from rlhf3d.parallel.layout import ParallelLayout


@settings(deadline=None, max_examples=40)
@given(pairs())
def test_a_checkpoint_of_any_layout_gives_every_tensor(pair: Pair) -> None:
    tensors = numbered_tensors(pair.spec)
    with tempfile.TemporaryDirectory() as root:
        folder = write_megatron_folder(Path(root) / "m", tensors, pair.spec, pair.layout, prefix="module.")
        source = MegatronSource(folder, pair.spec)
        assert source.role == "actor" and set(source.tensors) == set(tensors)
        for name, tensor in tensors.items():
            whole = torch.full_like(tensor, -1)
            source.read_into(name, full_box(tuple(tensor.shape)), whole)
            assert torch.equal(whole, tensor), name
            box = tuple((size // 3, size) for size in tensor.shape)
            part = torch.full([b - a for a, b in box], -1.0)
            source.read_into(name, box, part)
            assert torch.equal(part, tensor[tuple(slice(a, b) for a, b in box)]), name


def test_keys_by_hand() -> None:
    """As megatron-core 0.16 names them: stacked over layers, experts over layers and experts."""
    dense, sparse = stored_model(LLAMA, "value"), stored_model(QWEN3_MOE, "lm")
    assert dense.shapes["decoder.layers.mlp.linear_fc1.weight"] == (4, 48, 8)
    assert dense.shapes["decoder.layers.self_attention.linear_qkv.layer_norm_weight"] == (4, 8)
    assert dense.shapes["value_head.weight"] == (1, 8) and "output_layer.weight" not in dense.shapes
    assert sparse.shapes["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == (2, 4, 8, 12)
    assert sparse.shapes["decoder.layers.pre_mlp_layernorm.weight"] == (2, 8)
    assert "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.3_2.4" in sparse.extra_states()
    assert "decoder.layers.self_attention.linear_proj._extra_state/shard_3_4" in dense.extra_states()
    assert "decoder.layers.self_attention.q_layernorm._extra_state/shard_0_2" in sparse.extra_states()
    assert "decoder.final_layernorm._extra_state/shard_0_1" in sparse.extra_states()
    assert len(sparse.extra_states()) == 1 + 2 * (2 + 3 + 2 * 4)


def test_differences_lists_all() -> None:
    wanted = {"a": (2, 3), "b": (1,), "output_layer.weight": (5, 4)}
    assert differences(wanted, wanted | {"output_layer.weight": (8, 4)}) == []
    assert differences(wanted, {"a": (3, 2), "c": (1,), "output_layer.weight": (4, 4)}) == [
        "missing: b [1]",
        "extra: c [1]",
        "misshapen: a is [3, 2], the model's is [2, 3]",
        "misshapen: output_layer.weight is [4, 4], the model's is [5, 4]",
    ]


def test_rows_beyond_the_vocabulary_must_be_padding(tmp_path: Path) -> None:
    larger = numbered_tensors(LLAMA)
    folder = write_megatron_folder(tmp_path / "m", larger, LLAMA, ParallelLayout())
    smaller = replace(LLAMA, vocab_size=LLAMA.vocab_size - 2)
    with pytest.raises(MismatchError, match=r"word_embeddings\.weight has 70 rows, the vocabulary 68"):
        MegatronSource(folder, smaller)


def test_files_of() -> None:
    assert files_of({"a": 3, "b": 2, "c": 9, "d": 1, "e": 4}, 5) == [["a", "b"], ["c"], ["d", "e"]]
