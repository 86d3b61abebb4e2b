"""A fingerprint tells which bits a block has and where they belong, and nothing about the memory
they lie in.

Also proven: what it does not see, so that nobody relies on it.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.models.boxes import Box, box_slices, full_box
from rlhf3d.resharding.fingerprints import fetched
from rlhf3d.resharding.fingerprints import fingerprint as tensor_of

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(6, 16), (5, 7), (9, 3), (1, 8), (4, 1), (33,), (64,)]
"""Rows of whole 8-byte words and not, single rows and columns, vectors."""


def fingerprint(block: torch.Tensor, box: Box) -> int:
    """The number."""
    (number,) = fetched([tensor_of(block, box)])
    return number


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_layout_does_not_matter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, box = made(shape, dtype), full_box(shape)
    value = fingerprint(tensor, box)
    padded = torch.zeros(tuple(size + 3 for size in shape), dtype=dtype)
    inside = padded[tuple(slice(1, 1 + size) for size in shape)]  # odd offset, odd stride
    inside.copy_(tensor)
    wide = torch.zeros((*shape, 2), dtype=dtype)
    wide[..., 1].copy_(tensor)
    memory = torch.zeros(tensor.nbytes + 8, dtype=torch.uint8)
    shifted = (
        memory[8 - tensor.element_size() : 8 - tensor.element_size() + tensor.nbytes]
        .view(dtype)
        .view(shape)
    )
    shifted.copy_(tensor)
    layouts = {
        "a copy": tensor.clone(),
        "a block of a larger tensor": inside,
        "every other element": wide[..., 1],
        "memory not aligned to words": shifted,
        "leading dimensions of one": tensor[None],
    }
    if len(shape) == 2:
        layouts["transposed"] = tensor.t().contiguous().t()
    for name, other in layouts.items():
        assert fingerprint(other, box) == value, name
        assert torch.equal(other.reshape(shape), tensor), f"{name}: read only"


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_shared_memory_give_the_same(dtype: torch.dtype) -> None:
    tensor = made((8, 16), dtype)
    shared = tensor.clone().share_memory_()
    assert fingerprint(shared, full_box((8, 16))) == fingerprint(tensor, full_box((8, 16)))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.data())
def test_a_flipped_bit_shows(
    shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor, box = made(shape, dtype), full_box(shape)
    value = fingerprint(tensor, box)
    flat = integers(tensor).view(-1)
    bit = data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    place = data.draw(st.integers(0, len(flat) - 1))
    number = int(flat[place])
    flat[place] = (
        number ^ (1 << bit) if bit < 8 * tensor.element_size() - 1 else number ^ -(1 << bit)
    )
    assert int(flat[place]) != number
    assert fingerprint(tensor, box) != value


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.sampled_from([(6, 16), (5, 7), (9, 4)]),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
    st.data(),
)
def test_exchanged_rows_columns_and_blocks_show(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    tensor, box = made(shape, dtype, seed), full_box(shape)
    value = fingerprint(tensor, box)
    for dim in (0, 1):
        a, b = data.draw(
            st.lists(st.integers(0, shape[dim] - 1), min_size=2, max_size=2, unique=True)
        )
        order = list(range(shape[dim]))
        order[a], order[b] = order[b], order[a]
        other = tensor.index_select(dim, torch.tensor(order))
        assert torch.equal(other, tensor) or fingerprint(other, box) != value, (
            f"{'row column'.split()[dim]} {a}, {b}"
        )
        half = shape[dim] // 2
        first, second, rest = tensor.split([half, half, shape[dim] - 2 * half], dim)
        assert fingerprint(torch.cat([second, first, rest], dim), box) != value, "halves"
        assert fingerprint(tensor.roll(1, dim), box) != value, "rolled"


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_element_among_small_integers_shows(dtype: torch.dtype) -> None:
    """Weights with few distinct values, as a freshly made model has."""
    for make in (torch.zeros, torch.ones):
        block = make(8, 16).to(dtype)
        value = fingerprint(block, full_box((8, 16)))
        for row in range(8):
            for column in range(16):
                other = block.clone()
                other[row, column] = 2
                assert fingerprint(other, full_box((8, 16))) != value
    assert fingerprint(torch.eye(16).to(dtype), full_box((16, 16))) != fingerprint(
        torch.eye(16).flip(0).to(dtype), full_box((16, 16))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [(0, 8), (8, 16), (3, 8), (0, 5)])
def test_the_same_bits_elsewhere_in_the_tensor_show(
    columns: tuple[int, int], dtype: torch.dtype
) -> None:
    block = made((4, columns[1] - columns[0]), dtype)
    places: list[Box] = [((row, row + 4), columns) for row in (0, 4, 5, 1000)]
    places.append(((0, 4), (columns[0] + 32, columns[1] + 32)))
    assert len({fingerprint(block, place) for place in places}) == len(places)
    vector = made((8,), dtype)
    assert len({fingerprint(vector, ((start, start + 8),)) for start in (0, 8, 9, 16)}) == 4


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.sampled_from(DTYPES), st.data())
def test_blocks_add_up(dtype: torch.dtype, data: st.DataObject) -> None:
    """Rows cut anywhere, columns cut between words; the order is nobody's business."""
    shape = (7, 24)
    tensor = made(shape, dtype)
    rows = sorted({0, 7, *data.draw(st.sets(st.integers(1, 6), max_size=3))})
    columns = sorted({0, 24, *data.draw(st.sets(st.sampled_from([4, 8, 12, 16, 20]), max_size=3))})
    boxes: list[Box] = [((a, b), (c, d)) for a, b in pairwise(rows) for c, d in pairwise(columns)]
    total = sum(
        fingerprint(tensor[box_slices(box)], box) for box in data.draw(st.permutations(boxes))
    )
    assert (total - fingerprint(tensor, full_box(shape))) % 2**64 == 0


def test_row_blocks_of_unaligned_tensors_add_up() -> None:
    tensor = made((6, 5), torch.bfloat16)
    parts = [fingerprint(tensor[a:b], ((a, b), (0, 5))) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert (sum(parts) - fingerprint(tensor, full_box((6, 5)))) % 2**64 == 0


def test_two_flipped_top_bits_of_words_cancel() -> None:
    """The limit of arithmetic modulo 2^64 with odd weights: known, and named in the module."""
    tensor = made((2, 8), torch.bfloat16)
    other = tensor.clone()
    other[0, 3], other[1, 7] = -tensor[0, 3], -tensor[1, 7]  # last elements of their words
    assert fingerprint(other, full_box((2, 8))) == fingerprint(tensor, full_box((2, 8)))
    other[1, 7], other[1, 6] = tensor[1, 7], -tensor[1, 6]
    assert fingerprint(other, full_box((2, 8))) != fingerprint(tensor, full_box((2, 8)))


def test_an_offloaded_model_can_still_free_its_memory() -> None:
    weights = torch.ones(8, 16)
    fingerprint(weights[2:6], ((2, 6), (0, 16)))
    weights.untyped_storage().resize_(0)
    assert weights.untyped_storage().nbytes() == 0
