"""The torch_dist folder: blocks read back from any chunks, torch's own loader agrees, damage is named, no code runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from rlhf3d.checkpoints.torch_dist import (
    StoredTensor,
    TorchDistReader,
    finish_folder,
    write_tensors,
)
from rlhf3d.models.boxes import Box

A = torch.arange(120.0).reshape(2, 6, 10)
B = torch.arange(7).bfloat16()


def write(folder: Path) -> Path:
    """`a` as a grid of chunks over two files, `b` whole, and an empty object."""
    folder.mkdir()
    boxes: list[Box] = [
        ((i, i + 1), (r, r + 3), (c, c + 5)) for i in (0, 1) for r in (0, 3) for c in (0, 5)
    ]
    blocks = [("a", box, A[tuple(slice(x, y) for x, y in box)].contiguous()) for box in boxes]
    one, _ = write_tensors(folder / "__0_0.distcp", blocks[:3])
    two, _ = write_tensors(folder / "__1_0.distcp", [*blocks[3:], ("b", ((0, 7),), B)])
    chunks = {key: tuple(chunk for name, chunk in [*one, *two] if name == key) for key in "ab"}
    tensors = {
        "a": StoredTensor(torch.float32, (2, 6, 10), chunks["a"]),
        "b": StoredTensor(torch.bfloat16, (7,), chunks["b"]),
    }
    finish_folder(folder, tensors, ["x._extra_state/shard_0_2"], {"content_metadata": {}})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m")


@pytest.mark.parametrize(
    "box", [((0, 2), (0, 6), (0, 10)), ((0, 1), (2, 5), (1, 9)), ((1, 2), (0, 1), (5, 6))], ids=str
)
def test_reads_any_block(folder: Path, box: Box) -> None:
    reader, expected = TorchDistReader(folder), A[tuple(slice(a, b) for a, b in box)]
    assert reader.objects == ["x._extra_state/shard_0_2"]
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full(expected.shape, -1, dtype=dtype)
        reader.read_into("a", box, out)
        assert torch.equal(out, expected.to(dtype))
    strided = torch.empty(*reversed(expected.shape)).permute(2, 1, 0)
    reader.read_into("a", box, strided)
    assert torch.equal(strided, expected)


def test_transposed_and_shared_tensors_read_back(tmp_path: Path) -> None:
    """torch.save keeps the strides of what it is given."""
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "__0_0.distcp"
    ((_, chunk),), _ = write_tensors(file, [("a", ((0, 3), (0, 2)), torch.zeros(3, 2))])
    with open(file, "wb") as raw:
        torch.save(torch.arange(6.0).reshape(2, 3).T, raw)
    length = file.stat().st_size
    stored = StoredTensor(torch.float32, (3, 2), (type(chunk)(chunk.box, chunk.file, 0, length),))
    finish_folder(tmp_path / "m", {"a": stored}, [], {})
    out = torch.empty(2, 2)
    TorchDistReader(tmp_path / "m").read_into("a", ((1, 3), (0, 2)), out)
    assert torch.equal(out, torch.arange(6.0).reshape(2, 3).T[1:])


def test_torchs_own_loader_reads_it(folder: Path) -> None:
    state = {"a": torch.empty(2, 6, 10), "b": torch.empty(7, dtype=torch.bfloat16)}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    assert torch.equal(state["a"], A) and torch.equal(state["b"], B)


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    data = folder / "__1_0.distcp"
    whole = data.read_bytes()
    assert TorchDistReader(folder).corrupt_files() == []
    at = whole.index(B.view(torch.uint8).numpy().tobytes())
    data.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    assert TorchDistReader(folder).corrupt_files() == ["__1_0.distcp"]
    data.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"__1_0\.distcp is cut off"):
        TorchDistReader(folder)
    data.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=r"__1_0\.distcp: no tensor at byte"):
        TorchDistReader(folder).read_into("b", ((0, 7),), torch.empty(7))
    data.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*__1_0\.distcp"):
        TorchDistReader(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"\.metadata is not a checkpoint's index"):
        TorchDistReader(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"has no \.metadata"):
        TorchDistReader(folder)


def test_chunks_that_do_not_tile_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    ((_, chunk),), _ = write_tensors(
        tmp_path / "m" / "f.distcp", [("a", ((0, 2),), torch.zeros(2))]
    )
    finish_folder(tmp_path / "m", {"a": StoredTensor(torch.float32, (3,), (chunk,))}, [], {})
    with pytest.raises(ValueError, match="chunks of a do not tile it: 2 of 3 elements"):
        TorchDistReader(tmp_path / "m")


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


def test_an_index_with_code_is_refused(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(ValueError, match=r"it names posix\.system"):
        TorchDistReader(folder)
