"""Fingerprints of blocks: cheap, and tied to where in the tensor each element belongs.

Invariant: a block's fingerprint depends on the block's bits and its place in the Hugging Face
tensor alone, not on the memory it lies in; any one changed word changes it, as does any exchange of
rows or columns (with a chance of about 2^-63 of being missed). What it does not see: changes in
nothing but the top bits of an even number of words.

The fingerprint of W (as a matrix of 8-byte words) is the sum over i, j of row(i) column(j) W[i, j]
modulo 2^64, with odd pseudo-random weights: multiplying by an odd number is a bijection, so a
single change cannot cancel. Sums do not care for order, so blocks of a tensor may be summed
wherever they are: fingerprints of blocks whose columns are cut between words add up to the
tensor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

from rlhf3d.models.boxes import Box

WORD_BYTES = 8
Fingerprint: TypeAlias = "int | torch.Tensor"
"""A number on CPU; on a device an int64 without dimensions, which nothing has waited for."""


def fingerprint(block: torch.Tensor, box: Box) -> Fingerprint:
    """Fingerprint of `block`, which is the part `box` of its tensor (1-D or 2-D), on any device."""
    rows, columns, whole = _weights(box, block.element_size(), block.device)
    # Packed experts have a leading dimension of one that their tensor lacks.
    if block.dim() != 2:
        block = block.reshape(len(rows), -1)
    if whole:
        words = _as_words(block)
    else:
        words = block.contiguous().view(_INTEGERS[block.element_size()]).to(torch.int64)
    # int64 products and sums wrap around, which is the modulo 2^64.
    if words.device.type == "cpu":
        # numpy's loop takes half the time of torch's product of integers. Not by `Tensor.numpy`,
        # after which a storage cannot be resized any more: an offloaded model frees its own so.
        numbers = np.from_dlpack(words.detach())
        return int(np.einsum("ij,j->i", numbers, columns).dot(rows))
    # Integer matrix products exist on CPU only.
    return ((words * columns).sum(1) * rows).sum()


def fetched(fingerprints: Sequence[Fingerprint]) -> list[int]:
    """The numbers of several fingerprints, for which a device is waited for once."""
    if all(isinstance(one, int) for one in fingerprints):
        return [int(one) for one in fingerprints]
    numbers: list[int] = torch.stack([torch.as_tensor(one) for one in fingerprints]).tolist()
    return numbers


@cache
def _weights(box: Box, size: int, device: torch.device) -> tuple[Any, Any, bool]:
    """Weights of a block's rows and of its columns; whether columns are complete words.

    They go by the place in the complete tensor, so a block in another place has another sum. Words
    are decided by the box alone: both ends take the same branch, wherever their memory lies. Arrays
    of numpy on CPU, else tensors.
    """
    if len(box) == 1:
        box = ((0, 1), *box)
    (row_start, row_stop), (start, stop) = box
    whole = not (start * size % WORD_BYTES or stop * size % WORD_BYTES)
    if whole:
        stream, start, stop = 1, start * size // WORD_BYTES, stop * size // WORD_BYTES
    else:
        # An element is a word here, with weights of its own: its positions count elements.
        stream = 2
    rows = _odd_weights(0, row_stop, device)[row_start:row_stop]
    columns = _odd_weights(stream, stop, device)[start:stop]
    on_cpu = device.type == "cpu"
    return (rows.numpy(), columns.numpy(), whole) if on_cpu else (rows, columns, whole)


def box_shape(box: Box) -> tuple[int, ...]:
    """Shape of a box."""
    return tuple(stop - start for start, stop in box)


# Elements of 8 bytes are always complete words.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def _as_words(block: torch.Tensor) -> torch.Tensor:
    """The block as int64 [rows, words]; a copy only where its memory does not allow a view."""
    per_word = WORD_BYTES // block.element_size()
    # What `view` to a larger dtype asks for, and that reads of words are aligned.
    aligned = (
        block.stride(1) == 1
        and block.stride(0) % per_word == 0
        and block.data_ptr() % WORD_BYTES == 0
    )
    if not aligned or block.storage_offset() % per_word:
        block = block.clone(memory_format=torch.contiguous_format)
    return block.view(torch.int64)


@cache
def _cached_weights(stream: int, count: int, device: torch.device) -> torch.Tensor:
    """`count` odd int64 numbers: SplitMix64's mixer (Steele et al. 2014) over a stream."""
    # Streams are 2^40 positions apart and never meet; + 1, as the mixer maps 0 to 0.
    x = (np.arange(count, dtype=np.uint64) + np.uint64((stream << 40) + 1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)


def _odd_weights(stream: int, count: int, device: torch.device) -> torch.Tensor:
    """At least `count` weights; counts are rounded up so that few arrays are kept."""
    return _cached_weights(stream, 1 << max(10, (count - 1).bit_length()), device)
