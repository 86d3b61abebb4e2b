"""The rows of one forward pass, as the model and the loss take them.

Invariant: hidden state `prompt_length - 1 + t` of a row predicts its response token t. This file
alone knows it, and where a row's hidden states are: in a padded row of its own, or packed one row
after the other, and under context parallelism on which rank.
Runs in: training rank; the driver reads `UpdateResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.parallel.context import held_positions


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of b rows, and response-aligned columns [b, r] trimmed to the longest response.

    T counts the response tokens of all rows. Padded, the tokens are [b, s], s the longest row;
    packed, they are [1, s], s the sum of all rows. A context-parallel rank has its share of s and
    T.
    """

    rows: Batch
    """The rows, response-aligned columns trimmed to r."""
    input_ids: Tensor
    """[b, s], or [1, s] packed."""
    position_ids: Tensor
    """As input_ids; each packed row counts from 0."""
    hidden_index: Tensor
    """[T] index into the flattened hidden states that predict the response tokens."""
    response_index: Tensor
    """[T] index into the flattened [b * r] response-aligned columns."""
    labels: Tensor
    """[T] response tokens."""
    segment_ends: Tensor | None = None
    """Packed: [b + 1] int32, where each row starts and the last ends, over all context-parallel
    ranks; [b + 2] with padding, a segment of its own."""
    longest_segment: int = 0
    """Packed: tokens of the longest segment."""

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
    lengths = [1]  # of a filler
    if rows:
        lengths = batch.only(("prompt_lengths", "response_lengths")).select(rows).lengths()
    if rule.packed:
        return 1, _packed_ends(lengths, rule)[-1] // cp
    return len(lengths), rule.width(max(lengths)) // cp


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
    lengths = (prompts + responses).tolist()
    # The model's tokens are lines, [b, s] or [1, s]: where each row is in which of them.
    segment_ends, longest_segment = None, 0
    if rule.packed:
        ends = _packed_ends(lengths, rule)
        starts, line = torch.tensor(ends)[: len(part)], torch.zeros_like(row)
        segment_ends = move(torch.tensor(ends, dtype=torch.int32))
        longest_segment = max(stop - start for start, stop in pairwise(ends))
        ids, positions = _packed(part, lengths, ends)
    else:
        ends = [0, rule.width(max(lengths))]
        starts, line = torch.zeros(len(part), dtype=torch.long), row
        ids, positions = _padded(part, ends[-1])
    held = held_positions(ends, cp, cp_rank)
    column_of = torch.full((ends[-1],), -1).index_copy(0, held, torch.arange(len(held)))
    # The state before a token predicts it; -1 where another context-parallel rank holds it.
    column = column_of[starts[row] + position - 1]
    is_held = column >= 0
    return MicroBatch(
        rows=Batch({name: move(values) for name, values in _aligned(part, r).items()}),
        input_ids=move(ids[:, held]),
        position_ids=move(positions[:, held]),
        hidden_index=move((line * len(held) + column)[is_held]),
        response_index=move((row * r + t)[is_held]),
        labels=move(part["input_ids"][row, position][is_held]),
        segment_ends=segment_ends,
        longest_segment=longest_segment,
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


def _packed_ends(lengths: Sequence[int], rule: MicroBatching) -> list[int]:
    """Where each packed row starts and the last ends; then the end of the padding, if any."""
    ends = list(accumulate(map(rule.packed_row, lengths), initial=0))
    width = rule.width(ends[-1])
    return ends if width == ends[-1] else [*ends, width]


def _padded(part: Batch, width: int) -> tuple[Tensor, Tensor]:
    """Token and position ids [b, s]."""
    ids = part["input_ids"][:, :width]
    positions = torch.arange(width).expand(len(part), width)
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1])), positions


def _packed(part: Batch, lengths: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Token and position ids [1, s]; each segment counts from 0, padding too."""
    ids = torch.zeros(ends[-1], dtype=torch.long)
    positions = torch.zeros(ends[-1], dtype=torch.long)
    for row, (start, stop) in enumerate(pairwise(ends)):
        positions[start:stop] = torch.arange(stop - start)
        if row < len(lengths):
            ids[start : start + lengths[row]] = part["input_ids"][row, : lengths[row]]
    return ids[None], positions[None]


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
