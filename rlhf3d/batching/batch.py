"""The rows of one step: named tensor columns that share their first dimension.

Invariant: every column has the same number of rows, and row i of all columns is of the same tokens:
a trajectory, or one of several rows of it, which follow each other in order. Sequences are
right-padded: prompt tokens then response tokens from position 0; response-aligned columns are
[N, R].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Columns of N rows.

    Always present: input_ids [N, S], prompt_lengths [N], response_lengths [N], response_mask
    [N, R]. Added by the phases: rollout_logprobs, old_logprobs, ref_logprobs, values, advantages,
    returns [N, R]. Only where some trajectory has several rows: trajectory_ids [N].
    """

    columns: dict[str, Tensor]

    def __post_init__(self) -> None:
        rows = {name: tensor.shape[0] for name, tensor in self.columns.items()}
        assert len(set(rows.values())) == 1, f"columns of different row counts: {rows}"

    def __len__(self) -> int:
        return int(next(iter(self.columns.values())).shape[0])

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def select(self, rows: Sequence[int]) -> Batch:
        """Return these rows, in this order."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        return Batch({name: tensor[index] for name, tensor in self.columns.items()})

    def only(self, names: Iterable[str]) -> Batch:
        """Return the named columns: what a phase does not need is not sent."""
        return Batch({name: self.columns[name] for name in names})

    def with_columns(self, **columns: Tensor) -> Batch:
        """Return a batch with these columns added or replaced."""
        return Batch({**self.columns, **columns})

    def in_row_order(self, rows_of: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> Tensor:
        """Return a column [N, R] on the host from its parts, [b, r] of the rows in `rows_of` each.

        A part without rows is a filler's: it is left out. 0 where no part has a number.
        """
        column = torch.zeros_like(self["response_mask"])
        for rows, part in zip(rows_of, parts, strict=True):
            if rows:
                column[list(rows), : part.shape[1]] = part.cpu()
        return column

    def lengths(self) -> list[int]:
        """Return the tokens of each row, prompt and response."""
        return (self["prompt_lengths"] + self["response_lengths"]).tolist()


def from_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    **per_token: Sequence,
) -> Batch:
    """Pad lists of tokens into a batch.

    Each `per_token` is N lists of floats, aligned with the responses.
    """
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    response_lengths = torch.tensor([len(response) for response in responses])
    totals = (prompt_lengths + response_lengths).tolist()
    # A step of empty responses still has columns.
    width = max(int(response_lengths.max()), 1)
    input_ids = torch.full((len(totals), max(totals)), pad_id, dtype=torch.long)
    ids = input_ids.numpy()
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        # An `array` is read from its memory, not number by number.
        ids[row, : len(prompt)] = np.asarray(prompt)
        ids[row, len(prompt) : totals[row]] = np.asarray(response)
    columns = {
        "input_ids": input_ids,
        "prompt_lengths": prompt_lengths,
        "response_lengths": response_lengths,
    }
    if "response_mask" not in per_token:
        mask = torch.arange(width)[None, :] < response_lengths[:, None]
        columns["response_mask"] = mask.float()
    for name, values in per_token.items():
        column = torch.zeros(len(totals), width)
        numbers = column.numpy()
        for row, value in enumerate(values):
            tokens = len(responses[row])
            assert len(value) == tokens, f"{name}[{row}]: {len(value)} values, {tokens} tokens"
            numbers[row, :tokens] = np.asarray(value)
        columns[name] = column
    return Batch(columns)
