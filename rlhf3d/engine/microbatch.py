"""One forward pass's share of a batch, as the model and the loss want it.

Invariant: hidden state `prompt_length - 1 + t` of a row predicts its response token t; this file alone knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf3d.batching.batch import Batch


@dataclass(frozen=True)
class MicroBatch:
    """b rows trimmed to their longest: tokens [b, s], response-aligned columns [b, r]; T response tokens in all."""

    rows: Batch
    """The rows, response-aligned columns trimmed to r."""
    input_ids: Tensor
    """[b, s]"""
    position_ids: Tensor
    """[b, s]"""
    hidden_index: Tensor
    """[T] index into the flattened [b * s] hidden states that predict the response tokens."""
    response_index: Tensor
    """[T] index into the flattened [b * r] response-aligned columns."""
    labels: Tensor
    """[T] response tokens."""

    def scatter(self, values: Tensor) -> Tensor:
        """[T] values of the response tokens as [b, r], zero elsewhere."""
        mask = self.rows["response_mask"]
        flat = values.new_zeros(mask.numel())
        return flat.index_copy(0, self.response_index, values).view(mask.shape)

    def gather(self, hidden: Tensor) -> Tensor:
        """[b, s, …] states as the [T, …] states that predict the response tokens."""
        return hidden.flatten(0, 1).index_select(0, self.hidden_index)


def make_microbatch(batch: Batch, rows: Sequence[int], device: torch.device, multiple_of: int = 1) -> MicroBatch:
    """Cut `rows` out of the batch; the padded length is rounded up to `multiple_of` (sequence parallelism)."""
    part = batch.select(rows)
    prompts, responses = part["prompt_lengths"], part["response_lengths"]
    longest = int((prompts + responses).max())
    s = -(-longest // multiple_of) * multiple_of
    r = max(int(responses.max()), 1)
    aligned = part["response_mask"].shape[1]
    ids = part["input_ids"][:, :s]
    ids = torch.nn.functional.pad(ids, (0, s - ids.shape[1]))
    columns = {
        name: (column[:, :r] if column.dim() == 2 and name != "input_ids" else column)
        for name, column in part.columns.items()
        if name != "input_ids"
    }
    assert r <= aligned, f"responses of {r} tokens in columns of {aligned}"
    row, t = torch.nonzero(torch.arange(r)[None, :] < responses[:, None], as_tuple=True)
    position = prompts[row] + t
    return MicroBatch(
        rows=Batch({name: column.to(device) for name, column in columns.items()}),
        input_ids=ids.to(device),
        position_ids=torch.arange(s, device=device)[None].expand(len(rows), s),
        hidden_index=(row * s + position - 1).to(device),
        response_index=(row * r + t).to(device),
        labels=ids[row, position].to(device),
    )


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
