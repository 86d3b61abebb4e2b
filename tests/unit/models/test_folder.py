"""Which files of a folder are the model, compared with what transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from rlhf3d.models.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    model_tensors,
    read_header,
    weight_files,
)
from rlhf3d.models.hf_io import HFReader, model_view
from rlhf3d.paths import read_json

Tensors = dict[str, torch.Tensor]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "m", layers=1)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "m"))


def shards(folder: Path, tensors: Tensors, count: int, index: bool = True) -> None:
    """Write numbered shards in place of the single file."""
    (folder / SINGLE_NAME).unlink(missing_ok=True)
    names = list(tensors)
    files = {
        name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file(
            {n: tensors[n] for n in names if files[n] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    if index:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def old(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def consolidated_beside_shards(folder: Path, tensors: Tensors) -> None:
    shards(folder, tensors, 2)
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")


def adapter_beside(folder: Path, tensors: Tensors) -> None:
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def index_of_removed_shards(folder: Path, tensors: Tensors) -> None:
    (folder / INDEX_NAME).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-1-of-1.safetensors")})
    )


def index_that_is_broken(folder: Path, tensors: Tensors) -> None:
    (folder / INDEX_NAME).write_text("{")


def old_shards_beside_the_index(folder: Path, tensors: Tensors) -> None:
    shards(folder, old(tensors), 3, index=False)
    shards(folder, tensors, 2)


def old_shards_beside_the_file(folder: Path, tensors: Tensors) -> None:
    shards(folder, old(tensors), 3, index=False)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def variant_and_pickle(folder: Path, tensors: Tensors) -> None:
    save_file(old(tensors), folder / "model.fp16.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"x")


def nothing(folder: Path, tensors: Tensors) -> None:
    pass


@pytest.mark.parametrize(
    ("edit", "ignored"),
    [
        (nothing, ""),
        (consolidated_beside_shards, "consolidated.safetensors"),
        (adapter_beside, "adapter_config.json, adapter_model.safetensors"),
        (index_of_removed_shards, INDEX_NAME),
        (index_that_is_broken, INDEX_NAME),
        (old_shards_beside_the_index, "model-00001-of-00003.safetensors"),
        (old_shards_beside_the_file, "model-00001-of-00003.safetensors"),
        (variant_and_pickle, "model.fp16.safetensors, pytorch_model.bin"),
    ],
)
def test_the_files_are_those_that_transformers_loads(
    folder: Path, edit: Callable[[Path, Tensors], None], ignored: str
) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    edit(folder, tensors)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    with HFReader(folder) as reader:
        assert set(reader.names()) == set(tensors)
        for name in reader.names():
            assert torch.equal(
                reader.read(name, tuple((0, n) for n in reader.shape(name))), loaded[name]
            ), name
    assert bool(reader.notes) == bool(ignored) and all(ignored in note for note in reader.notes)
    with model_view(folder) as view:  # what is handed to vLLM: nothing to choose from
        there = {file.name for file in view.iterdir()}
        assert there >= {*weight_files(folder).names, "config.json", "tokenizer.json"}
        assert {name for name in there if name.endswith(".safetensors")} == set(
            weight_files(folder).names
        )
        assert "adapter_config.json" not in there
        again = AutoModelForCausalLM.from_pretrained(view).state_dict()
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)


def test_shards_without_index_are_the_model_where_they_are_all_there(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    shards(folder, tensors, 2, index=False)
    with model_view(folder) as view:
        loaded = AutoModelForCausalLM.from_pretrained(view).state_dict()
    assert torch.equal(loaded["model.norm.weight"], tensors["model.norm.weight"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has 1 of 2 shards \(model-00001-of-00002"):
        weight_files(folder)


def test_two_models_in_a_folder_are_refused_with_both_names(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    shards(folder, old(tensors), 2)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    both = (
        r"holds two models: model\.safetensors, .* and model-00001-of-00002\.safetensors, "
        r"model-00002-.*remove one"
    )
    with pytest.raises(ValueError, match=both):
        weight_files(folder)
    (folder / SINGLE_NAME).unlink()
    (folder / INDEX_NAME).unlink()
    shards(folder, tensors, 3, index=False)
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002\.safetensors and model-00001-of-00003\.safetensors"
    ):
        weight_files(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", r"index\.json holds a JSON list, not an object"),
        ("{", r"index\.json is not JSON"),
        ("{}", r"has no weight_map"),
        ('{"weight_map": ["a"]}', r"has no weight_map"),
        ('{"weight_map": {"a": 3}}', r"gives 3 as the file of a"),
        (
            '{"weight_map": {"a": "../a.safetensors"}}',
            r"gives '\.\./a\.safetensors' as the file of a",
        ),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"lacks gone\.safetensors, 1 of the 1 files"),
        (POINTER, r"is a git-lfs pointer.*git lfs pull"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(ValueError, match=message):
        weight_files(tmp_path)


def test_an_index_and_its_files_must_agree(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    shards(folder, tensors, 2)
    save_file({"model.norm.weight": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError,
        match=r"model\.norm\.weight is both in|names tensors that are not there: model\.",
    ):
        model_tensors(weight_files(folder))


def test_what_is_no_weight_file_says_what_it_is(tmp_path: Path) -> None:
    file, whole = tmp_path / SINGLE_NAME, tmp_path / "whole"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, whole)
    good = whole.read_bytes()
    for content, message in (
        (POINTER.encode(), "git-lfs pointer"),
        (b"", "is no safetensors file, or is cut off"),
        (good[:20], "is no safetensors file, or is cut off"),
        (good[:-8], r"has \d+ bytes, its header says"),
        (good + b"x", r"has \d+ bytes, its header says"),
        ((2).to_bytes(8, "little") + b"[]", "is no safetensors file"),
        (good.replace(b"[4]", b"[5]"), "is no safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
            read_header(file)
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match=r"holds a as F8_E4M3: .*not quantized ones"):
        model_tensors(weight_files(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", r"holds an adapter .*merge it into its base"),
        (
            "model.fp16.safetensors",
            r"has neither model\.safetensors nor .*; model\.fp16\.safetensors is not",
        ),
        ("model.gguf", r"model\.gguf is not what transformers loads"),
        ("pytorch_model.bin", r"only as pickles"),
    ],
)
def test_a_folder_without_the_model_says_what_it_has(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        weight_files(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).symlink_to("../blobs/gone")
    with pytest.raises(ValueError, match=r"model\.safetensors links to a file that is not there"):
        weight_files(tmp_path)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    for content, message in (
        (b"[]", "a JSON list, not an object"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (POINTER.encode(), "git-lfs pointer"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"config\.json (is|holds) .*{message}"):
            read_json(tmp_path / "config.json")


def test_a_folder_of_the_model_alone_is_its_own_view(tmp_path: Path) -> None:
    """Caches that go by the path know it again."""
    folder = make_tiny_model(tmp_path / "m")
    with model_view(folder) as view:
        assert view == folder.resolve()
