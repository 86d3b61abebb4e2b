"""Rows that went to a rank and back are those that were sent, bit for bit, in any order."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.rows import single_rows

from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.packed import pack, pack_columns, put_in_rows


def tokens_of(batch: Batch) -> dict[str, list[torch.Tensor]]:
    """Of each column and row what belongs to its tokens."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, column in batch.columns.items():
        lengths = batch["response_lengths"]
        if name == "input_ids":
            lengths = lengths + batch["prompt_lengths"]
        whole = column.dim() == 1
        found[name] = [
            row if whole else row[:length] for row, length in zip(column, lengths, strict=True)
        ]
    return found


@pytest.mark.parametrize("rows", [[3, 0, 5, 1], [4], []])
def test_every_column_comes_back_bit_for_bit(rows: list[int]) -> None:
    batch = single_rows(0, 6, 11, torch.float32)
    nan = batch["old_logprobs"].clone()
    nan[3, 0] = torch.nan
    batch = batch.with_columns(old_logprobs=nan)
    # As Ray has it: buffers out of the pickle, which the reader must not write to.
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(pack(batch, rows), protocol=5, buffer_callback=buffers.append)
    read_only = [bytes(buffer.raw()) for buffer in buffers]
    assert not rows or len(head) < 4000, "numbers are in buffers"
    unpacked = pickle.loads(head, buffers=read_only).unpack()
    wanted, found = tokens_of(batch.select(rows)), tokens_of(unpacked)
    assert unpacked.columns.keys() == batch.columns.keys() and len(unpacked) == len(rows)
    for name, column in unpacked.columns.items():
        assert column.dtype == batch[name].dtype
        for mine, theirs in zip(found[name], wanted[name], strict=True):
            assert torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))
        column += 1  # it is the rank's own


def test_what_is_behind_a_row_does_not_travel_and_is_0_again() -> None:
    batch = from_sequences([[1, 2], [3]], [[4, 5, 6], [7]], pad_id=9)
    batch.columns["response_mask"][1, 2] = 5.0
    packed = pack(batch, [1])
    assert packed.unpack()["input_ids"].tolist() == [[3, 7]]
    assert packed.unpack()["response_mask"].tolist() == [[1.0]]
    both = pack(batch, [1, 0]).unpack()
    assert both["input_ids"].tolist() == [[3, 7, 0, 0, 0], [1, 2, 4, 5, 6]]
    assert both["response_mask"].tolist() == [[1.0, 0, 0], [1.0, 1, 1]]


def test_a_mask_that_is_no_mask_is_refused() -> None:
    batch = from_sequences([[1]], [[4, 5]], pad_id=0)
    batch.columns["response_mask"][0, 1] = 0.5
    with pytest.raises(AssertionError, match="int8"):
        pack(batch, [0])


def test_columns_of_replicas_go_into_their_rows() -> None:
    lengths = torch.tensor([2, 0, 3, 1])
    column = torch.zeros(4, 3)
    first = torch.tensor([[1.0, 2, 3], [4, 9, 9]])
    put_in_rows(column, [2, 3], lengths, pack_columns({"x": first}, lengths[[2, 3]])["x"])
    second = torch.tensor([[9.0, 9, 9], [5, 6, 9]])
    put_in_rows(column, [1, 0], lengths, pack_columns({"x": second}, lengths[[1, 0]])["x"])
    assert column.tolist() == [[5, 6, 0], [0, 0, 0], [1, 2, 3], [4, 0, 0]]
    with pytest.raises(AssertionError, match="3 values of 2 tokens"):
        put_in_rows(column, [0], lengths, first[0].numpy())
