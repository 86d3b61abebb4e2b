"""One forward pass's share of a batch, as the model and the loss want it.

Invariant: hidden state `prompt_length - 1 + t` of a row predicts its response token t; this file alone knows it, and
where a row's hidden states stand: in a padded row of its own, or packed one row after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of b rows, and response-aligned columns [b, r] trimmed to the longest response; T response tokens in all.

    Padded, the tokens are [b, s], s the longest row; packed, they are [1, s], s the sum of all rows.
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
    """Packed: [b + 1] int32, where each row starts and the last ends; [b + 2] with padding, a segment of its own."""
    longest_segment: int = 0
    """Packed: tokens of the longest segment."""

    def scatter(self, values: Tensor) -> Tensor:
        """[T] values of the response tokens as [b, r], zero elsewhere."""
        mask = self.rows["response_mask"]
        flat = values.new_zeros(mask.numel())
        return flat.index_copy(0, self.response_index, values).view(mask.shape)

    def gather(self, hidden: Tensor) -> Tensor:
        """[b, s, …] states, or [1, s, …] packed, as the [T, …] states that predict the response tokens."""
        return hidden.flatten(0, 1).index_select(0, self.hidden_index)


def make_microbatch(
    batch: Batch, rows: Sequence[int], device: torch.device, multiple_of: int = 1, packed: bool = False
) -> MicroBatch:
    """Cut `rows` out of the batch; the width is rounded up to `multiple_of` (sequence parallelism).

    No rows make a filler: one row of one masked token, which adds nothing to loss, gradient or metrics.
    """
    part = batch.select(rows) if rows else _filler(batch)
    prompts, responses = part["prompt_lengths"], part["response_lengths"]
    lengths = prompts + responses
    r = max(int(responses.max()), 1)
    assert r <= part["response_mask"].shape[1], f"responses of {r} tokens in columns of {part['response_mask'].shape}"
    row, t = torch.nonzero(torch.arange(r)[None, :] < responses[:, None], as_tuple=True)
    position = prompts[row] + t
    ids, positions = _packed(part, lengths, multiple_of) if packed else _padded(part, lengths, multiple_of)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row_starts = ends[:-1] if packed else torch.arange(len(part)) * ids.shape[1]
    if packed and ids.shape[1] > ends[-1]:
        ends = torch.cat([ends, ends.new_full((1,), ids.shape[1])])
    return MicroBatch(
        rows=Batch({name: column.to(device) for name, column in _aligned(part, r).items()}),
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        hidden_index=(row_starts[row] + position - 1).to(device),
        response_index=(row * r + t).to(device),
        labels=part["input_ids"][row, position].to(device),
        segment_ends=ends.to(device, torch.int32) if packed else None,
        longest_segment=int(ends.diff().max()) if packed else 0,
    )


def _filler(batch: Batch) -> Batch:
    """One row of one prompt token and no response."""
    columns = {name: column.new_zeros(1, *column.shape[1:]) for name, column in batch.columns.items()}
    return Batch({**columns, "prompt_lengths": torch.ones(1, dtype=torch.long)})


def _aligned(part: Batch, r: int) -> dict[str, Tensor]:
    """All columns but the tokens, response-aligned ones trimmed to r."""
    columns = {name: column for name, column in part.columns.items() if name != "input_ids"}
    return {name: column[:, :r] if column.dim() == 2 else column for name, column in columns.items()}


def _round_up(tokens: int, multiple_of: int) -> int:
    return -(-tokens // multiple_of) * multiple_of


def _padded(part: Batch, lengths: Tensor, multiple_of: int) -> tuple[Tensor, Tensor]:
    """Token and position ids [b, s], s the longest row rounded up."""
    s = _round_up(int(lengths.max()), multiple_of)
    ids = part["input_ids"][:, :s]
    return torch.nn.functional.pad(ids, (0, s - ids.shape[1])), torch.arange(s).expand(len(part), s)


def _packed(part: Batch, lengths: Tensor, multiple_of: int) -> tuple[Tensor, Tensor]:
    """Token and position ids [1, s], s the sum of the rows rounded up; padding counts from 0 as well."""
    positions = torch.arange(part["input_ids"].shape[1]).expand(len(part), -1)
    real = positions < lengths[:, None]
    padding = torch.arange(_round_up(int(lengths.sum()), multiple_of) - int(lengths.sum()))
    ids = torch.cat([part["input_ids"][real], torch.zeros_like(padding)])
    return ids[None], torch.cat([positions[real], padding])[None]


@dataclass(frozen=True)
class UpdateResult:
    """What one update of one data-parallel rank gives."""

    shares: dict[str, float]
    """Metric shares, averaged over mini-batches; they add up over data-parallel ranks. Empty before the last stage."""
    grad_norm: float
    """Global gradient norm before clipping, averaged over mini-batches."""
    lr: float
    skipped: tuple[str, ...] = ()
    """Why optimizer steps were left out, one text each; the same on every rank."""
