"""Optimizer steps whose loss or gradient is not finite, found on all ranks before any weight moves.

Invariant: every rank of the training world raises the same NonFiniteUpdate, or none does; so a step
is taken by all ranks or by none.
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
    """Raise NonFiniteUpdate on every rank when any has a loss term or gradient norm not finite.

    `shares` are this rank's loss terms, `seen` the rows and the model's outputs [b, r] of its
    micro-batches (neither before the last pipeline stage). The message names terms, sequences and
    which of their numbers are broken. A collective over all ranks: one flag, and the texts only
    when there is something to report.
    """
    terms = sorted(name for name, value in shares.items() if not math.isfinite(value))
    flag = torch.tensor(float(bool(terms) or not math.isfinite(grad_norm)), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if not flag:
        return
    # Placeholders: all_gather_object replaces every element, so one shared tuple is safe.
    gathered: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(gathered, (terms, _broken_sequences(seen)))
    # Dictionaries keep the order of ranks and take out repetitions.
    all_terms: dict[str, None] = {}
    sequences: dict[str, None] = {}
    for rank_terms, rank_sequences in gathered:
        all_terms |= dict.fromkeys(rank_terms)
        sequences |= dict.fromkeys(rank_sequences)
    raise NonFiniteUpdate(
        f"not finite: loss terms {', '.join(all_terms) or 'none'}, gradient norm {grad_norm:g}, "
        f"{_where(list(sequences))}"
    )


def _where(sequences: list[str]) -> str:
    if not sequences:
        return "every input and output of the loss is finite: the backward pass overflowed"
    more = [f"and {len(sequences) - _SHOWN} more"] if len(sequences) > _SHOWN else []
    return "; ".join([*sequences[:_SHOWN], *more])


def _broken_sequences(seen: Sequence[tuple[Batch, Mapping[str, Tensor]]]) -> list[str]:
    """One text per sequence with a broken number among inputs of the loss and outputs."""
    texts = []
    for rows, outputs in seen:
        mask = rows["response_mask"]
        columns = rows.columns.items()
        # Per-token inputs of the loss are [b, r]; lengths and other columns have other shapes.
        inputs = {name: column for name, column in columns if column.shape == mask.shape}
        for row, names in nonfinite_rows({**inputs, **outputs}, mask).items():
            known = "sequence" in rows
            sequence = f"sequence {int(rows['sequence'][row])}" if known else "a sequence"
            texts.append(f"{sequence} ({', '.join(names)})")
    return texts
