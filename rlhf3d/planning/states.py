"""Weights, gradients and optimizer state of one model on one rank, in bytes.

Invariant: exact: the sizes that Megatron's own buffers have, padding included, for every rank of every layout (checked
against real ranks in tests/integration/test_planning.py). Shapes come from the weight table alone. Pure: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head, LocalParam, SpecStyle, local_params
from rlhf3d.parallel.layout import ParallelLayout, RankCoords

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
BUCKET_ELEMENTS = 40_000_000
"""Megatron's least bucket of gradients, where their reduction overlaps the backward pass."""
BUCKET_ELEMENTS_A_REPLICA = 1_000_000
PARAM_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class States:
    """Bytes that live as long as the run."""

    weights: int
    gradients: int = 0
    """The fp32 buffer that gradients are accumulated and reduced in."""
    master: int = 0
    """fp32 copies of bf16 weights."""
    moments: int = 0
    """Adam's two, fp32."""

    @property
    def optimizer(self) -> int:
        """Master weights and moments."""
        return self.master + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Sizes:
    """Elements of the parameters of one model chunk, in the weight table's order."""

    dense: tuple[int, ...]
    experts: tuple[int, ...]
    tied: int | None
    """Place among `dense` of a parameter that two pipeline stages hold: it has a bucket of its own."""
    largest: int
    """Elements of the largest parameter."""

    @property
    def total(self) -> int:
        """All elements."""
        return sum(self.dense) + sum(self.experts)


def chunk_sizes(
    spec: ModelSpec, layout: ParallelLayout, pp: int, chunk: int, head: Head, style: SpecStyle = "local"
) -> Sizes:
    """Of a chunk on the ranks of one pipeline stage: tensor, data and expert ranks all hold as many."""
    return _chunk_sizes(spec, replace(layout, dp=_least_dp(layout)), pp, chunk, head, style)


def _least_dp(layout: ParallelLayout) -> int:
    """The fewest replicas that the expert groups need: shapes do not depend on more, and so are computed once."""
    return layout.ep // math.gcd(layout.ep, layout.tp)


@cache
def _chunk_sizes(spec: ModelSpec, layout: ParallelLayout, pp: int, chunk: int, head: Head, style: SpecStyle) -> Sizes:
    params = local_params(spec, layout, RankCoords(0, pp, 0), chunk, head, style)
    sizes = [(param, math.prod(param.shape)) for param in params]
    dense = [(param, size) for param, size in sizes if not param.expert]
    shared = head == "lm" and spec.tie_embeddings and layout.pp > 1
    return Sizes(
        dense=tuple(size for _, size in dense),
        experts=tuple(size for param, size in sizes if param.expert),
        tied=next((i for i, (param, _) in enumerate(dense) if shared and _is_vocabulary(param)), None),
        largest=max(size for _, size in sizes),
    )


def _is_vocabulary(param: LocalParam) -> bool:
    return param.name in ("embedding.word_embeddings.weight", "output_layer.weight")


def model_states(
    spec: ModelSpec,
    layout: ParallelLayout,
    coords: RankCoords,
    head: Head,
    dtype: str,
    *,
    trained: bool = True,
    distributed_optimizer: bool = True,
    overlap_grad_reduce: bool = False,
    style: SpecStyle = "local",
) -> States:
    """One model on the rank at `coords`. Raises nothing: `layout` must have passed `check_layout`.

    With the distributed optimizer weights lie in the buffers as well, each parameter's start and each bucket's end
    padded, and a replica keeps the fp32 state of its share of each bucket (ZeRO stage 1, arXiv 1910.02054).
    """
    item = ITEM_BYTES[dtype]
    master = 4 if dtype == "bfloat16" else 0
    chunks = [chunk_sizes(spec, layout, coords.pp, chunk, head, style) for chunk in range(layout.vpp)]
    elements = sum(chunk.total for chunk in chunks)
    if not trained:
        return States(elements * item)
    if not distributed_optimizer:
        return States(elements * item, elements * 4, elements * master, elements * 8)
    buffered = owned = 0
    expert_dp = layout.tp * layout.dp // layout.ep
    limit = max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_A_REPLICA * layout.dp) if overlap_grad_reduce else None
    for number, chunk in enumerate(chunks):
        bucketed = limit if number == 0 and coords.pp == 0 else None
        for sizes, tied, replicas, replica in (
            (chunk.dense, chunk.tied, layout.dp, coords.dp),
            (chunk.experts, None, expert_dp, layout.expert_replica(coords)),
        ):
            total, share = _buffer(sizes, tied, replicas, replica, bucketed)
            buffered, owned = buffered + total, owned + share
    return States(buffered * item, buffered * 4, owned * master, owned * 8)


@cache
def _buffer(
    sizes: Sequence[int], tied: int | None, replicas: int, replica: int, bucket_elements: int | None
) -> tuple[int, int]:
    """Elements of a buffer, and elements of parameters in one replica's share of its buckets.

    Megatron's `_ParamAndGradBuffer`: parameters from last to first, starts padded to 64 elements, a bucket's end to a
    multiple of 128 and of the replicas.
    """
    divisor = math.lcm(replicas, BUCKET_ALIGNMENT)
    buckets: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    start = bucket_start = 0
    for place in reversed(range(len(sizes))):
        start = _round_up(start, PARAM_ALIGNMENT)
        if place == tied and start > bucket_start:
            start = _round_up(start, divisor)
            buckets.append((bucket_start, start))
            bucket_start = start
        stop = start + sizes[place]
        spans.append((start, stop))
        start = stop
        if place == tied or (bucket_elements is not None and stop - bucket_start >= bucket_elements):
            start = _round_up(stop, divisor)
            buckets.append((bucket_start, start))
            bucket_start = start
    if start > bucket_start:
        buckets.append((bucket_start, _round_up(start, divisor)))
    owned = 0
    for bucket_start, bucket_stop in buckets:
        share = (bucket_stop - bucket_start) // replicas
        low = bucket_start + replica * share
        owned += sum(max(0, min(stop, low + share) - max(begin, low)) for begin, stop in spans)
    return (buckets[-1][1] if buckets else 0), owned


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
