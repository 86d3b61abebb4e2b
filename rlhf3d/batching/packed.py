"""Rows of a batch on their way between driver and ranks: tokens without the padding after them.

Invariant: `unpack` gives the rows that were packed, bit for bit as far as a row has tokens, and 0
behind them. All is numpy arrays, which Ray carries as they lie in memory: it reads a tensor's bytes
into its pickle, twice copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch

NARROW = {"input_ids": np.int32, "response_mask": np.int8}
"""On their way, columns of numbers that are small and whole: token ids, and 0 or 1."""
Column = tuple[np.ndarray, torch.dtype]
"""Numbers, and what they become again."""


@dataclass(frozen=True)
class PackedRows:
    """n rows, in order."""

    prompt_lengths: np.ndarray
    """[n]"""
    response_lengths: np.ndarray
    """[n]"""
    by_row: Mapping[str, Column]
    """[n]"""
    by_token: Mapping[str, Column]
    """Of each row its response tokens, one row after the other; `input_ids` with the prompt's."""

    def unpack(self) -> Batch:
        """As a batch, padded to its own longest row and response."""
        prompts = torch.from_numpy(self.prompt_lengths.copy())
        responses = torch.from_numpy(self.response_lengths.copy())
        columns = {"prompt_lengths": prompts, "response_lengths": responses}
        # Copies: the arrays may lie in memory that several processes read.
        for name, (values, dtype) in self.by_row.items():
            columns[name] = torch.from_numpy(values.copy()).to(dtype)
        for name, (values, dtype) in self.by_token.items():
            lengths = prompts + responses if name == "input_ids" else responses
            columns[name] = _padded(values, lengths.numpy(), dtype)
        return Batch(columns)


def pack(batch: Batch, rows: Sequence[int]) -> PackedRows:
    """These rows, in this order; what a column holds behind a row's tokens is left out."""
    index = np.array(rows, dtype=np.int64)
    by_row, by_token = {}, {}
    prompts, responses = batch["prompt_lengths"].numpy(), batch["response_lengths"].numpy()
    for name, column in batch.columns.items():
        if name in ("prompt_lengths", "response_lengths"):
            continue
        values = column.numpy()
        if column.dim() == 1:
            by_row[name] = values[index], column.dtype
            continue
        lengths = prompts + responses if name == "input_ids" else responses
        by_token[name] = _narrowed(_tokens(values, index, lengths), NARROW.get(name)), column.dtype
    return PackedRows(prompts[index], responses[index], by_row, by_token)


def pack_columns(columns: Mapping[str, Tensor], lengths: Tensor) -> dict[str, np.ndarray]:
    """Response-aligned columns [n, R] as [T], the response tokens of one row after the other."""
    rows, ends = np.arange(len(lengths)), lengths.numpy()
    return {name: _tokens(column.cpu().numpy(), rows, ends) for name, column in columns.items()}


def put_in_rows(column: Tensor, rows: Sequence[int], lengths: Tensor, values: np.ndarray) -> None:
    """Write [T] values of response tokens, as `pack_columns` gives them, into rows of `column`.

    `lengths` [N]: responses of all rows of the column, which is [N, R].
    """
    padded, ends, start = column.numpy(), lengths.tolist(), 0
    for row in rows:
        stop = start + ends[row]
        padded[row, : ends[row]] = values[start:stop]
        start = stop
    assert start == len(values), f"{len(values)} values of {start} tokens"


def _tokens(values: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first `lengths[row]` values of each of the rows, one after the other."""
    flat = np.empty(int(lengths[rows].sum()), values.dtype)
    start = 0
    for row, length in zip(rows.tolist(), lengths[rows].tolist(), strict=True):
        flat[start : start + length] = values[row, :length]
        start += length
    return flat


def _narrowed(values: np.ndarray, dtype: type[np.generic] | None) -> np.ndarray:
    if dtype is None:
        return values
    narrow: np.ndarray = values.astype(dtype)
    assert np.array_equal(narrow, values), f"values that {dtype} does not hold"
    return narrow


def _padded(values: np.ndarray, lengths: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[n, longest] of values of one row after the other; a column of no tokens still is one."""
    width = max(int(lengths.max(initial=0)), 1)
    padded = torch.zeros((len(lengths), width), dtype=dtype)
    view, start = padded.numpy(), 0
    for row, length in enumerate(lengths.tolist()):
        view[row, :length] = values[start : start + length]
        start += length
    return padded
