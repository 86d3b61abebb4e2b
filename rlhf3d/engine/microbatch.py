"""The rows of one forward pass, as the model and the loss take them.

Invariant: hidden state `prompt_length - 1 + t` of a row predicts its response token t. This file
alone knows it, and where a row's hidden states are: in a padded row of its own, packed one row
after the other, or packed with those that rows share once; and under context parallelism on which
rank.
Runs in: training rank; the driver reads `UpdateResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.batching.prefixes import Segment, segments_of, sort_rows, token_strings
from rlhf3d.parallel.context import held_positions

if TYPE_CHECKING:
    from rlhf3d.parallel.tree_attention import TreeSpan


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of b rows, and response-aligned columns [b, r] trimmed to the longest response.

    T counts the response tokens of all rows. Padded, the tokens are [b, s], s the longest row;
    packed, they are [1, s], s the sum of all rows, or of their segments where rows share some. A
    context-parallel rank has its share of s and T.
    """

    rows: Batch
    """The rows, response-aligned columns trimmed to r."""
    input_ids: Tensor
    """[b, s], or [1, s] packed."""
    position_ids: Tensor
    """As input_ids; each packed row counts from 0."""
    hidden_index: Tensor
    """[T] index into the flattened hidden states that predict the response tokens. Shared ones
    occur several times, and their gradients add up."""
    response_index: Tensor
    """[T] index into the flattened [b * r] response-aligned columns."""
    labels: Tensor
    """[T] response tokens."""
    segment_ends: Tensor | None = None
    """Packed: [b + 1] int32, where each row starts and the last ends, over all context-parallel
    ranks; [b + 2] with padding, a segment of its own."""
    longest_segment: int = 0
    """Packed: tokens of the longest segment, with all that comes before it in its rows."""
    tree: tuple[TreeSpan, ...] | None = None
    """Where rows share segments: the segments, see `TreeSpan`."""

    def scatter(self, values: Tensor) -> Tensor:
        """Return [T] values of the response tokens as [b, r], zero elsewhere."""
        mask = self.rows["response_mask"]
        flat = values.new_zeros(mask.numel())
        return flat.index_copy(0, self.response_index, values).view(mask.shape)

    def gather(self, hidden: Tensor) -> Tensor:
        """Return the [T, …] of [b, s, …] (packed: [1, s, …]) states that predict responses."""
        return hidden.flatten(0, 1).index_select(0, self.hidden_index)


def token_shape(
    batch: Batch, rows: Sequence[int], rule: MicroBatching, cp: int = 1
) -> tuple[int, int]:
    """Return (b, s) of a micro-batch's tokens on one context-parallel rank, without making it."""
    if not rows:
        return 1, rule.width(1) // cp  # a filler
    part = batch.only(("input_ids", "prompt_lengths", "response_lengths")).select(rows)
    lengths = part.lengths()
    segments = _shared_segments(part, lengths, rule)
    if segments is not None:
        return 1, rule.width(segments[-1].end)
    if rule.packed:
        return 1, _packed_ends(lengths, rule)[-1] // cp
    return len(lengths), rule.width(max(lengths)) // cp


@dataclass(frozen=True)
class _Tokens:
    """The model's tokens of some rows, [b, s] or [1, s], over all context-parallel ranks."""

    ids: Tensor
    positions: Tensor
    column: Tensor
    """[b, longest row] where each of a row's positions is along s."""
    ends: list[int]
    """Where what is attended to by itself starts along s, and the last ends."""
    tree: tuple[TreeSpan, ...] | None = None


def make_microbatch(
    batch: Batch,
    rows: Sequence[int],
    move: Callable[[Tensor], Tensor],
    rule: MicroBatching,
    cp: int = 1,
    cp_rank: int = 0,
) -> MicroBatch:
    """Cut `rows` out of the batch, padded or packed to the widths of `rule`.

    Returns the share of one context-parallel rank. `move` puts a tensor on the device. No rows make
    a filler: one row of one masked token, which adds nothing to loss, gradient or metrics.
    """
    part = batch.select(rows) if rows else _filler(batch)
    prompts, responses = part["prompt_lengths"], part["response_lengths"]
    r = max(int(responses.max()), 1)
    assert r <= part["response_mask"].shape[1], (
        f"responses of {r} tokens in columns of {part['response_mask'].shape}"
    )
    # Of every response token: its row, its number in the response, its position in the row.
    row, t = torch.nonzero(torch.arange(r)[None, :] < responses[:, None], as_tuple=True)
    position = prompts[row] + t
    tokens = _tokens(part, rule)
    assert tokens.tree is None or cp == 1, "context-parallel ranks share no prefixes"
    held = held_positions(tokens.ends, cp, cp_rank)
    held_at = torch.full((tokens.ends[-1],), -1).index_copy(0, held, torch.arange(len(held)))
    # The state before a token predicts it; -1 where another context-parallel rank holds it.
    column = held_at[tokens.column[row, position - 1]]
    is_held = column >= 0
    line = row if len(tokens.ids) > 1 else torch.zeros_like(row)
    segment_ends, longest_segment = None, 0
    if rule.packed or tokens.tree is not None:
        segment_ends = move(torch.tensor(tokens.ends, dtype=torch.int32))
        longest_segment = int(tokens.positions.max()) + 1
    return MicroBatch(
        rows=Batch({name: move(values) for name, values in _aligned(part, r).items()}),
        input_ids=move(tokens.ids[:, held]),
        position_ids=move(tokens.positions[:, held]),
        hidden_index=move((line * len(held) + column)[is_held]),
        response_index=move((row * r + t)[is_held]),
        labels=move(part["input_ids"][row, position][is_held]),
        segment_ends=segment_ends,
        longest_segment=longest_segment,
        tree=tokens.tree,
    )


def _filler(batch: Batch) -> Batch:
    """One row of one prompt token and no response."""
    columns = {
        name: column.new_zeros(1, *column.shape[1:]) for name, column in batch.columns.items()
    }
    return Batch({**columns, "prompt_lengths": torch.ones(1, dtype=torch.long)})


def _aligned(part: Batch, r: int) -> dict[str, Tensor]:
    """All columns except the tokens, response-aligned ones trimmed to r."""
    columns = {}
    for name, column in part.columns.items():
        if name != "input_ids":
            columns[name] = column[:, :r] if column.dim() == 2 else column
    return columns


def _tokens(part: Batch, rule: MicroBatching) -> _Tokens:
    lengths = part.lengths()
    segments = _shared_segments(part, lengths, rule)
    if segments is not None:
        return _shared(part, segments, rule)
    return _packed(part, lengths, rule) if rule.packed else _padded(part, max(lengths), rule)


def _padded(part: Batch, longest: int, rule: MicroBatching) -> _Tokens:
    width = rule.width(longest)
    ids = part["input_ids"][:, :width]
    positions = torch.arange(width).expand(len(part), width)
    padded = torch.nn.functional.pad(ids, (0, width - ids.shape[1]))
    return _Tokens(padded, positions, positions, [0, width])


def _packed_ends(lengths: Sequence[int], rule: MicroBatching) -> list[int]:
    """Where each packed row starts and the last ends; then the end of the padding, if any."""
    ends = list(accumulate(map(rule.packed_row, lengths), initial=0))
    width = rule.width(ends[-1])
    return ends if width == ends[-1] else [*ends, width]


def _packed(part: Batch, lengths: Sequence[int], rule: MicroBatching) -> _Tokens:
    """Rows one after the other; each segment counts from 0, padding too."""
    ends = _packed_ends(lengths, rule)
    ids = torch.zeros(ends[-1], dtype=torch.long)
    positions = torch.zeros(ends[-1], dtype=torch.long)
    for row, (start, stop) in enumerate(pairwise(ends)):
        positions[start:stop] = torch.arange(stop - start)
        if row < len(lengths):
            ids[start : start + lengths[row]] = part["input_ids"][row, : lengths[row]]
    column = torch.tensor(ends)[: len(part), None] + torch.arange(max(lengths))
    return _Tokens(ids[None], positions[None], column, ends)


def _shared_segments(
    part: Batch, lengths: Sequence[int], rule: MicroBatching
) -> list[Segment] | None:
    """The segments of rows that have some in common; None for other rows."""
    if not rule.share_prefixes or len(part) == 1:
        return None
    found = sort_rows(range(len(part)), token_strings(part["input_ids"], lengths))
    return segments_of(found, lengths) if any(found.shared) else None


def _shared(part: Batch, segments: Sequence[Segment], rule: MicroBatching) -> _Tokens:
    """Segments one after the other, counted on from those before them in their rows."""
    end = segments[-1].end
    width = rule.width(end)
    ids = torch.zeros(width, dtype=torch.long)
    positions = torch.zeros(width, dtype=torch.long)
    column = torch.zeros_like(part["input_ids"])
    spans = []
    for segment in segments:
        along, within = slice(segment.column, segment.end), slice(segment.start, segment.stop)
        ids[along] = part["input_ids"][segment.rows[0], within]
        positions[along] = torch.arange(segment.start, segment.stop)
        column[list(segment.rows), within] = torch.arange(segment.column, segment.end)
        spans.append((segment.column, segment.end, segment.reach))
    # Padding sees nothing but itself; its positions do not matter.
    if width > end:
        spans.append((end, width, width))
    ends = [0, *(stop for _, stop, _ in spans)]
    return _Tokens(ids[None], positions[None], column, ends, tuple(spans))


@dataclass(frozen=True)
class UpdateResult:
    """The result of one update on one data-parallel rank."""

    shares: dict[str, float]
    """Metric shares, averaged over mini-batches; they add up over data-parallel ranks. Empty before
    the last stage."""
    grad_norm: float
    """Global gradient norm before clipping, averaged over mini-batches."""
    lr: float
    skipped: tuple[str, ...] = ()
    """Why optimizer steps were skipped, one text each; the same on every rank."""
    logprobs: Tensor | None = None
    """[n, R] of the rows, before the update, where the objective's old policy is the current one.
    None before the last stage."""
