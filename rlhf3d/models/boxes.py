"""Index boxes: blocks of tensors, and which block of one lies where in another.

Invariant: a box is (start, stop) per dimension with start < stop; functions return boxes inside
their arguments. Pure: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

Box = tuple[tuple[int, int], ...]
"""(start, stop) per dimension."""


@dataclass(frozen=True)
class Piece:
    """A block: `hf_box` of a Hugging Face tensor, and `local_box` of the local parameter."""

    hf_name: str
    hf_box: Box
    local_box: Box


def full_box(shape: tuple[int, ...]) -> Box:
    """The box that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def box_slices(box: Box) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def inside(part: Box, box: Box) -> tuple[slice, ...]:
    """The index of a sub-box of `box` in a tensor that is that box."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(part, box, strict=True))


def volume(box: Box) -> int:
    """Number of elements."""
    return math.prod(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """The block that lies in both boxes, if any."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    # Boxes that only touch have nothing in common.
    return common if all(start < stop for start, stop in common) else None


def locate(piece: Piece, hf_box: Box) -> Box:
    """Where a sub-box of `piece.hf_box` lies in the local parameter.

    The local box may have leading dimensions of size one that the Hugging Face tensor lacks (an
    expert's number).
    """
    lead = len(piece.local_box) - len(piece.hf_box)
    inner = zip(piece.local_box[lead:], piece.hf_box, hf_box, strict=True)
    return piece.local_box[:lead] + tuple(
        (own + a - start, own + b - start) for (own, _), (start, _), (a, b) in inner
    )


def split_rows(box: Box, parts: int) -> list[Box]:
    """`box` cut along its first dimension into at most `parts` boxes of nearly equal size."""
    (start, stop), *rest = box
    # A row is not cut, and no part may be empty.
    parts = min(parts, stop - start)
    cuts = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return [((a, b), *rest) for a, b in pairwise(cuts)]


def row_boxes(shape: tuple[int, ...], itemsize: int, limit_bytes: int) -> Iterator[Box]:
    """Cut `shape` along its first dimension into boxes of at most `limit_bytes`, or of one row."""
    rows, *columns = shape
    step = max(1, limit_bytes // (itemsize * math.prod(columns)))
    for start in range(0, rows, step):
        yield ((start, min(rows, start + step)), *((0, size) for size in columns))


def show(box: Box) -> str:
    """`[0:64, 0:576]`."""
    return f"[{', '.join(f'{start}:{stop}' for start, stop in box)}]"
