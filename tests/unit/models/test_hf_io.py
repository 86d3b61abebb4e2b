"""Reading blocks of safetensors and writing complete folders."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_model
from support.weights import sparse_weights

from rlhf3d.models.folder import INDEX_NAME
from rlhf3d.models.hf_io import HFReader, check_weights, copy_in_range, write_model
from rlhf3d.models.spec import load_reward_spec, load_spec

TENSORS = {
    "a": torch.arange(24.0).reshape(4, 6),
    "b": torch.arange(5.0),
    "c": torch.full((3, 3), 2.0),
}
FORMS = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "merges.txt").write_text("a b")
    for name in (
        "additional_chat_templates/rag.jinja",
        "tokenization_own.py",
        "vocab.bpe",
        "LICENSE",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / INDEX_NAME).write_text("stale")
    for name in (
        "pytorch_model.bin",
        ".git/HEAD",
        "original/params.json",
        "original/model.pth",
        "flax_model.msgpack",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("shard_bytes", [2**20, 100], ids=["one-file", "sharded"])
def test_written_folder_reads_back(tmp_path: Path, source: Path, shard_bytes: int) -> None:
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    write_model(folder, FORMS, TENSORS.items(), source, max_shard_gib=shard_bytes / 2**30)
    sharded = (folder / INDEX_NAME).is_file()
    assert sharded == (shard_bytes == 100)
    with HFReader(folder) as reader:
        assert sorted(reader.names()) == ["a", "b", "c"] and reader.shape("a") == (4, 6)
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name, tuple((0, n) for n in tensor.shape)), tensor)
        assert torch.equal(reader.read("a", ((1, 3), (2, 5))), TENSORS["a"][1:3, 2:5])
        assert torch.equal(reader.read("b", ((4, 5),)), TENSORS["b"][4:5])
    weights = {file.name for file in folder.iterdir() if file.suffix == ".safetensors"}
    assert weights == (
        {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
        if sharded
        else {"model.safetensors"}
    )
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names - weights - {INDEX_NAME} == {
        "config.json",
        "chat_template.jinja",
        "merges.txt",
        "additional_chat_templates/rag.jinja",
        "tokenization_own.py",
        "vocab.bpe",
        "LICENSE",
    }
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]


def test_config_records_the_written_dtype(tmp_path: Path, source: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    forms = {name: (shape, torch.bfloat16) for name, (shape, _) in FORMS.items()}
    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", forms, halves.items(), source)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "m" / "model.safetensors")["a"].dtype == torch.bfloat16


def test_every_tensor_comes_once_in_the_form_announced(tmp_path: Path, source: Path) -> None:
    """Nothing is written that is not all of the model."""
    everything = list(TENSORS.items())
    odd = [
        everything[:-1],
        [*everything, everything[0]],
        everything[::-1],
        [*everything[:-1], ("c", TENSORS["c"].bfloat16())],
    ]
    for number, tensors in enumerate(odd):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        with pytest.raises(AssertionError):
            write_model(folder, FORMS, tensors, source)


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path, source: Path) -> None:
    """A tensor is free for the next one as soon as it is written."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            copied = tensor.clone()
            assert sum(other() is not None for other in alive) <= 1
            alive.append(weakref.ref(copied))
            yield name, copied
            del copied

    (tmp_path / "m").mkdir()
    write_model(tmp_path / "m", FORMS, one_by_one(), source)


def test_a_tied_head_that_is_written_out_must_be_the_embedding(tmp_path: Path) -> None:
    """In any dtype that holds the same values; a run and a conversion ask the same function."""
    folder = make_tiny_model(tmp_path / "m", "qwen2", tie=True, layers=1, dtype=torch.bfloat16)
    spec, tensors = load_spec(folder), load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding.float()):
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        check_weights(folder, spec, "lm")
    for head in (embedding + 1, embedding[1:].clone()):
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        with pytest.raises(
            ValueError,
            match=r"^model\.path: .*tie_word_embeddings true, but a lm_head\.weight of its",
        ):
            check_weights(folder, spec, "lm")
        check_weights(folder, spec, "value")  # a critic has no use for it


@pytest.mark.parametrize(
    "change", [{"eos_token_id": "2"}, {"attention_bias": None}, {"dtype": "float3"}], ids=str
)
def test_what_transformers_refuses_in_a_config_is_found_before_a_run(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """Keys of which the trainer reads nothing, and for which vLLM would fail in its own process."""
    folder = make_tiny_model(tmp_path / "m", layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(
        ValueError, match=r"^model\.path: transformers does not read .*config\.json: .*; correct it"
    ):
        check_weights(folder, load_spec(folder), "lm")


def test_a_value_beyond_the_dtypes_range_is_refused() -> None:
    out, block = torch.zeros(3, dtype=torch.float16), torch.tensor([1.0, -1e6, float("inf")])
    with pytest.raises(
        ValueError, match=r"^X holds a value of 1e\+06, beyond the range of float16"
    ):
        copy_in_range(out, block, "X holds a value")
    copy_in_range(out, torch.tensor([65504.0, float("inf"), float("nan")]), "X")
    assert out[0] == 65504 and out[1].isinf() and out[2].isnan(), "what was infinite stays so"


def test_a_reward_model_needs_one_output(tmp_path: Path) -> None:
    """A language model, and a classifier of three classes, are refused by the key that names
    them.
    """
    shape = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 4,
        "num_attention_heads": 1,
        "vocab_size": 8,
        "intermediate_size": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 40,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    for tensors, wrong in (
        ({}, r"has no score\.weight \[1, 4\]"),
        ({"score.weight": torch.ones(3, 4)}, r"\[3, 4\] as"),
    ):
        save_file({"x": torch.ones(1), **tensors}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"^reward_model\.path: .* {wrong}"):
            load_reward_spec(tmp_path)
    save_file({"score.weight": torch.ones(1, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^reward_model\.path: .* lacks model\."):
        load_reward_spec(tmp_path)
    sparse_weights(tmp_path, "value")
    assert load_reward_spec(tmp_path).hidden_size == 4
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"^reward_model\.path: .* has model_type 'gpt2'"):
        load_reward_spec(tmp_path)
