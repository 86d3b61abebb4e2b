"""The torch_dist folder: blocks read back from any chunks, torch's own loader agrees, damage is
named, no code runs.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from rlhf3d.checkpoints.torch_dist import Block, TorchDistReader, write_folder
from rlhf3d.models.boxes import Box, box_slices

A = torch.arange(120.0).reshape(2, 6, 10)
B = torch.arange(7).bfloat16()


def write(folder: Path) -> Path:
    """`a` as a grid of chunks over two files, `b` in one chunk, and an empty object."""
    boxes: list[Box] = []
    for i, row, column in product((0, 1), (0, 3), (0, 5)):
        boxes.append(((i, i + 1), (row, row + 3), (column, column + 5)))
    blocks = [Block("a", box, torch.float32, (2, 6, 10)) for box in boxes]
    files = [blocks[:3], [*blocks[3:], Block("b", ((0, 7),), torch.bfloat16, (7,))]]
    write_folder(
        folder,
        files,
        lambda block: {"a": A, "b": B}[block.key][box_slices(block.box)],
        ["x._extra_state/shard_0_2"],
        {"content_metadata": {}},
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m")


@pytest.mark.parametrize(
    "box", [((0, 2), (0, 6), (0, 10)), ((0, 1), (2, 5), (1, 9)), ((1, 2), (0, 1), (5, 6))], ids=str
)
def test_reads_any_block(folder: Path, box: Box) -> None:
    reader = TorchDistReader(folder)
    assert reader.objects == ["x._extra_state/shard_0_2"]
    assert torch.equal(reader.read("a", box), A[box_slices(box)])
    assert torch.equal(reader.read("b", ((2, 7),)), B[2:])
    for chunk in reader.tensors["a"].chunks:
        assert torch.equal(reader.read_chunk(chunk), A[box_slices(chunk.box)])


def test_a_tensor_saved_with_other_strides_reads_back(tmp_path: Path) -> None:
    """torch.save keeps the strides of what a trainer gave it."""
    values = torch.arange(6.0).reshape(2, 3).T
    block = Block("a", ((0, 3), (0, 2)), torch.float32, (3, 2))
    write_folder(tmp_path, [[block]], lambda block: values)
    assert torch.equal(TorchDistReader(tmp_path).read("a", ((1, 3), (0, 2))), values[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_is_mapped_and_its_file_never_changes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Wherever an archive begins: torch aligns values within it only."""
    values = torch.arange(5000).to(dtype)
    blocks = [Block(f"t{i}", ((0, 5000 + i),), dtype, (5000 + i,)) for i in range(8)]
    write_folder(
        tmp_path, [blocks], lambda block: values.new_full((block.shape[0],), int(block.key[1:]))
    )
    reader, file = TorchDistReader(tmp_path), tmp_path / "__0_0.distcp"
    before, mapped = file.read_bytes(), 0
    for number, block in enumerate(blocks):
        (chunk,) = reader.tensors[block.key].chunks
        found = reader.read_chunk(chunk)
        mapped += str(file) in Path("/proc/self/maps").read_text()
        assert found.dtype == dtype and found.data_ptr() % dtype.itemsize == 0
        assert torch.equal(found, values.new_full((5000 + number,), number))
        found.fill_(7)
        del found
    assert mapped and file.read_bytes() == before
    assert str(file) not in Path("/proc/self/maps").read_text()  # held as long as it is used


def read_rewritten(
    folder: Path, change: Callable[[str, bytes], bytes], compression: int
) -> torch.Tensor:
    """A folder's only chunk, after each record of its archive was changed."""
    reader = TorchDistReader(folder)
    (chunk,) = reader.chunks()
    file, content = folder / chunk.file, io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(content, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    file.write_bytes(content.getvalue())
    return reader.read_chunk(replace(chunk, length=len(content.getvalue())))


@pytest.mark.parametrize("kind", ["compressed", "of another byte order"])
def test_what_cannot_be_mapped_is_read(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path, [[Block("b", ((0, 7),), torch.bfloat16, (7,))]], lambda block: B)

    def change(name: str, record: bytes) -> bytes:
        if kind == "compressed":
            return record
        swapped = np.frombuffer(record, np.int16).byteswap().tobytes() if "data/0" in name else b""
        return {"byteorder": b"big", "data/0": swapped}.get(name, record)

    how = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    assert torch.equal(read_rewritten(tmp_path, change, how), B)


@pytest.mark.parametrize("change", [lambda b: b[:-2], lambda b: b + b"xx"], ids=["short", "long"])
def test_a_record_of_another_size_is_refused(
    change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """What lies beside it is never taken for values."""
    write_folder(tmp_path, [[Block("b", ((0, 7),), torch.bfloat16, (7,))]], lambda block: B)

    def changed(name: str, record: bytes) -> bytes:
        return change(record) if name == "data/0" else record

    with pytest.raises(ValueError, match=r"__0_0\.distcp: no tensor at byte 0"):
        read_rewritten(tmp_path, changed, zipfile.ZIP_STORED)


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
        TorchDistReader(folder).read("b", ((0, 7),))
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
    block = Block("a", ((0, 2),), torch.float32, (3,))
    write_folder(tmp_path, [[block]], lambda block: torch.zeros(2))
    with pytest.raises(ValueError, match="chunks of a do not tile it: 2 of 3 elements"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize(
    "values",
    [torch.zeros(3, 3), torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.bfloat16)],
    ids=["larger", "smaller", "another dtype"],
)
def test_a_tensor_that_is_not_what_the_index_says_is_refused(
    values: torch.Tensor, tmp_path: Path
) -> None:
    """torch's own loader cuts a larger one down."""
    block = Block("a", ((0, 2), (0, 3)), torch.float32, (2, 3))
    write_folder(tmp_path, [[block]], lambda block: values)
    with pytest.raises(ValueError) as refused:
        TorchDistReader(tmp_path).read("a", ((0, 1), (0, 1)))
    found = f"a is {list(values.shape)} of {values.dtype}, "
    for piece in ("__0_0.distcp", found, "the index says [2, 3] of torch.float32"):
        assert piece in str(refused.value)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


def test_an_index_with_code_is_refused(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(ValueError, match=r"it names posix\.system"):
        TorchDistReader(folder)
