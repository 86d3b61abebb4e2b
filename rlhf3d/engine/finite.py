"""An optimizer step whose loss or gradient is not finite: found on all ranks at once, before any weight moves.

Invariant: every rank of the training world raises the same NonFiniteUpdate, or none does; so a step is taken by all
ranks or by none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf3d.algorithms.health import nonfinite_rows
from rlhf3d.batching.batch import Batch

_SHOWN = 5


class NonFiniteUpdate(RuntimeError):
    """The step was not taken: its loss or its gradient is NaN or infinite."""


def require_finite(
    shares: Mapping[str, float],
    grad_norm: float,
    seen: Sequence[tuple[Batch, Mapping[str, Tensor]]],
    device: torch.device,
) -> None:
    """Raise NonFiniteUpdate on every rank when any rank has a loss term or a gradient norm that is not finite.

    `shares` are this rank's loss terms, `seen` the rows and the model's outputs [b, r] of its micro-batches (neither
    before the last pipeline stage). The message names terms, sequences and which of their numbers are broken. A
    collective over all ranks: one flag, and the texts only when there is something to tell.
    """
    terms = sorted(name for name, value in shares.items() if not math.isfinite(value))
    flag = torch.tensor(float(bool(terms) or not math.isfinite(grad_norm)), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if not flag:
        return
    gathered: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(gathered, (terms, _broken_sequences(seen)))
    all_terms = list(dict.fromkeys(term for part, _ in gathered for term in part))
    sequences = list(dict.fromkeys(text for _, part in gathered for text in part))
    where = "; ".join(sequences[:_SHOWN]) + (
        f"; and {len(sequences) - _SHOWN} more" if sequences[_SHOWN:] else ""
    )
    raise NonFiniteUpdate(
        f"not finite: loss terms {', '.join(all_terms) or 'none'}, gradient norm {grad_norm:g}, "
        f"{where or 'every input and output of the loss is finite: the backward pass overflowed'}"
    )


def _broken_sequences(seen: Sequence[tuple[Batch, Mapping[str, Tensor]]]) -> list[str]:
    """One text for each sequence with a broken number among the loss's inputs and the model's outputs."""
    texts = []
    for rows, outputs in seen:
        mask = rows["response_mask"]
        inputs = {
            name: column for name, column in rows.columns.items() if column.shape == mask.shape
        }
        for row, names in nonfinite_rows({**inputs, **outputs}, mask).items():
            number = (
                f"sequence {int(rows['sequence'][row])}" if "sequence" in rows else "a sequence"
            )
            texts.append(f"{number} ({', '.join(names)})")
    return texts
