"""How a destination's bytes are cut into buckets, and what each sender puts where in them.

Invariant: a bucket holds complete rows of parameters in the engine's own order, at most the budget;
a parameter that fits the budget lies in one bucket, so that its receiver can use it where it lies.
Sender and receiver derive the same buckets and the same copies from the plan. Pure: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rlhf3d.models.boxes import Box, intersect
from rlhf3d.models.weights import LocalParam
from rlhf3d.resharding.plan import ReshardPlan
from rlhf3d.units import round_up

# A multiple of every dtype's size and of a fingerprint's word: segments can be viewed as either.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Segment:
    """Rows of one parameter in a bucket."""

    param: int
    rows: tuple[int, int]
    shape: tuple[int, ...]
    """Of these rows."""
    offset: int
    """Bytes from the start of the bucket."""
    complete: bool
    """Whether these are all rows of the parameter, padding included."""


@dataclass(frozen=True)
class Bucket:
    """One portion of a sync."""

    segments: tuple[Segment, ...]
    num_bytes: int


@dataclass(frozen=True)
class Copy:
    """One block on its way: from a sender's parameter into a segment."""

    sender: int
    row: int
    """Number among the copies of this sender to this destination: its place in the table of
    fingerprints.
    """
    src_chunk: int
    src_param: str
    src_box: Box
    offset: int
    shape: tuple[int, ...]
    """Offset and shape of the segment."""
    box: Box
    """Place in the segment."""
    tensor: str
    hf_box: Box

    @cached_property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shape and strides of the block in its segment, and where it begins, in elements."""
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        first = sum(start * step for (start, _), step in zip(self.box, strides, strict=True))
        return tuple(stop - start for start, stop in self.box), tuple(strides), first


def plan_buckets(
    table: Sequence[LocalParam], itemsize: int, budget_bytes: int
) -> tuple[Bucket, ...]:
    """Buckets of at most `budget_bytes` for the parameters of one engine rank.

    Elements have `itemsize` bytes. Raises ValueError when not one row of a parameter fits.
    """
    buckets: list[Bucket] = []
    segments: list[Segment] = []
    used = 0
    for number, param in enumerate(table):
        row_bytes = math.prod(param.shape[1:]) * itemsize
        if row_bytes > budget_bytes:
            raise ValueError(
                f"rollout.sync_bucket_mib: a bucket of {budget_bytes} bytes cannot hold one row of "
                f"{param.name} ({row_bytes} bytes); raise it"
            )
        # Padding of the vocabulary is not sent: the receiver zeroes it.
        start, stop = 0, real_rows(param)
        while start < stop:
            # In rows; `used` may exceed the budget by the padding behind the last segment.
            room = max(0, budget_bytes - used) // row_bytes
            # A parameter that fits a bucket is never cut: it begins a new one instead.
            fits_alone = (stop - start) * row_bytes <= budget_bytes
            if segments and (room == 0 or (fits_alone and room < stop - start)):
                # `used` is rounded up past the last segment, which may take it beyond the budget.
                buckets.append(Bucket(tuple(segments), min(used, budget_bytes)))
                segments, used = [], 0
                continue
            end = min(stop, start + room)
            # False where the parameter has padding, which no segment carries.
            complete = (start, end) == (0, param.shape[0])
            segments.append(
                Segment(number, (start, end), (end - start, *param.shape[1:]), used, complete)
            )
            used = _align(used + (end - start) * row_bytes)
            start = end
    if segments:
        buckets.append(Bucket(tuple(segments), min(used, budget_bytes)))
    return tuple(buckets)


def real_rows(param: LocalParam) -> int:
    """Rows up to the last that is not padding."""
    return max((piece.local_box[0][1] for piece in param.pieces), default=0)


def copies_to(
    plan: ReshardPlan, dst: int, sender: int, buckets: Sequence[Bucket]
) -> list[list[Copy]]:
    """By bucket: what `sender` copies to destination `dst`."""
    table = plan.engine_tables[plan.destinations[dst].index]
    numbers = {param.name: i for i, param in enumerate(table)}
    # Parameter number -> (bucket number, segment) for each of its segments.
    segments: dict[int, list[tuple[int, Segment]]] = {}
    for number, bucket in enumerate(buckets):
        for segment in bucket.segments:
            segments.setdefault(segment.param, []).append((number, segment))
    copies: list[list[Copy]] = [[] for _ in buckets]
    # Counted over all buckets: a row of the fingerprint table is used once a sync.
    row = 0
    for op in plan.ops_from(sender, dst):
        for number, segment in segments[numbers[op.dst_param]]:
            placed = _place(op.dst_box, segment)
            # An op knows nothing of buckets: a large block reaches into several.
            if placed is None:
                continue
            inside, dst_part = placed
            copies[number].append(
                Copy(
                    sender=sender,
                    row=row,
                    src_chunk=op.src_chunk,
                    src_param=op.src_param,
                    src_box=_same_part(op.src_box, op.dst_box, dst_part),
                    offset=segment.offset,
                    shape=segment.shape,
                    box=inside,
                    tensor=op.tensor,
                    hf_box=_same_part(op.box, op.dst_box, dst_part),
                )
            )
            row += 1
    return copies


def _place(dst_box: Box, segment: Segment) -> tuple[Box, Box] | None:
    """The part of `dst_box` that lies in a segment: its box there, and its box in the parameter."""
    window = (segment.rows, *((0, size) for size in segment.shape[1:]))
    common = intersect(dst_box, window)
    if common is None:
        return None
    # Only rows are cut, so the other dimensions keep their place.
    first = segment.rows[0]
    (a, b), *rest = common
    return ((a - first, b - first), *rest), common


def _same_part(box: Box, dst_box: Box, part: Box) -> Box:
    """The part of `box` that corresponds to `part` of the equally large `dst_box`.

    Where the two have different numbers of dimensions the leading ones, of size one, are skipped.
    """
    # Only packed experts differ in number: [1, rows, columns] there, [rows, columns] in the tensor.
    dims = min(len(box), len(dst_box))
    lead = box[: len(box) - dims]
    inner = zip(box[len(box) - dims :], dst_box[-dims:], part[-dims:], strict=True)
    return lead + tuple(
        (own + a - start, own + b - start) for (own, _), (start, _), (a, b) in inner
    )


def _align(offset: int) -> int:
    return round_up(offset, ALIGNMENT_BYTES)
