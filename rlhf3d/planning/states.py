"""Weights, gradients and optimizer state of one model on one rank, in bytes.

Invariant: exact: the sizes that Megatron's own buffers have, padding included, for every rank of
every layout (checked against real ranks in tests/integration/test_planning.py). Shapes come from
the weight table alone. Pure: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head, LocalParam, local_params
from rlhf3d.parallel.layout import ParallelLayout, RankCoords, SpecStyle
from rlhf3d.units import ITEM_BYTES, round_up

BUCKET_ELEMENTS = 40_000_000
"""Megatron's least bucket of gradients, where their reduction overlaps the backward pass."""
# With many replicas Megatron's buckets grow, so that NCCL's ring stays bound by bandwidth.
BUCKET_ELEMENTS_A_REPLICA = 1_000_000
# Megatron aligns a parameter to 128 bytes and a bucket to 256, in elements of 2 bytes.
PARAM_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
LAYER_PREFIX = "decoder.layers."
"""Start of the names of a decoder layer's parameters."""


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
    """Place among `dense` of a parameter that two pipeline stages hold: it has a bucket of its
    own."""
    largest: int
    """Elements of the largest parameter."""
    total: int
    """All elements."""


@cache
def chunk_sizes(
    spec: ModelSpec,
    layout: ParallelLayout,
    pp: int,
    chunk: int,
    head: Head,
    style: SpecStyle = "local",
) -> Sizes:
    """Return the sizes of a model chunk on any rank of one pipeline stage: they are all the same.

    Which layers they are does not matter, nor how many stages and replicas there are: the table is
    asked for the same piece of the smallest model that has one, so that a search asks it a few
    times.
    """
    first, last = pp == 0 and chunk == 0, pp == layout.pp - 1 and chunk == layout.vpp - 1
    # The smallest pipeline with such a chunk: 1 stage, an end of 2, or the middle of 3.
    stages = 3 - first - last
    # ep has to divide tp x dp: the fewest replicas that let it.
    dp = layout.ep // math.gcd(layout.ep, layout.tp)
    smallest = ParallelLayout(tp=layout.tp, pp=stages, dp=dp, ep=layout.ep)
    layers = len(layout.layers(spec.num_layers, pp, chunk))
    return _chunk_sizes(
        replace(spec, num_layers=stages), smallest, 0 if first else 1, layers, head, style
    )


@cache
def _chunk_sizes(
    spec: ModelSpec, layout: ParallelLayout, pp: int, layers: int, head: Head, style: SpecStyle
) -> Sizes:
    """`spec` has one layer a stage; its layer counts `layers` times."""
    params = local_params(spec, layout, RankCoords(0, pp, 0), 0, head, style)
    sizes = [(param, math.prod(param.shape)) for param in params]
    # A layer's parameters stand together. Their order is kept: padding depends on it.
    repeated = [param.name.startswith(LAYER_PREFIX) for param in params]
    start, stop = repeated.index(True), len(repeated) - repeated[::-1].index(True)
    sizes = sizes[:start] + sizes[start:stop] * layers + sizes[stop:]
    dense = [(param, size) for param, size in sizes if not param.expert]
    experts = tuple(size for param, size in sizes if param.expert)
    # On a single stage a tied head is the embedding's own parameter.
    shared = head == "lm" and spec.tie_embeddings and layout.pp > 1
    return Sizes(
        dense=tuple(size for _, size in dense),
        experts=experts,
        tied=next(
            (i for i, (param, _) in enumerate(dense) if shared and _is_vocabulary(param)), None
        ),
        largest=max(size for _, size in sizes),
        total=sum(size for _, size in sizes),
    )


def _is_vocabulary(param: LocalParam) -> bool:
    return param.name in ("embedding.word_embeddings.weight", "output_layer.weight")


@cache
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
    """One model on the rank at `coords`.

    Raises nothing: `layout` must have passed `check_layout`.

    With the distributed optimizer weights lie in the buffers as well, each parameter's start and
    each bucket's end padded, and a replica keeps the fp32 state of its share of each bucket (ZeRO
    stage 1, arXiv 1910.02054).
    """
    item = ITEM_BYTES[dtype]
    master = 4 if dtype == "bfloat16" else 0
    chunks = [
        chunk_sizes(spec, layout, coords.pp, chunk, head, style) for chunk in range(layout.vpp)
    ]
    elements = sum(chunk.total for chunk in chunks)
    # A frozen model has no DDP buffers, so nothing is padded.
    if not trained:
        return States(elements * item)
    # Nor does Megatron pad buffers that are all-reduced whole.
    if not distributed_optimizer:
        return States(elements * item, elements * 4, elements * master, elements * 8)
    buffered = owned = 0
    expert_dp = layout.stage_size // layout.ep
    limit = (
        max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_A_REPLICA * layout.dp) if overlap_grad_reduce else None
    )
    # Megatron cuts only the first stage's first chunk into buckets: the reductions of all others
    # are off the critical path.
    for number, chunk in enumerate(chunks):
        bucketed = limit if number == 0 and coords.pp == 0 else None
        # Experts have a buffer of their own, as they are reduced over fewer replicas.
        for sizes, tied, replicas, replica in (
            (chunk.dense, chunk.tied, layout.replicas, layout.replica(coords)),
            (chunk.experts, None, expert_dp, layout.expert_replica(coords)),
        ):
            total, share = _buffer(sizes, tied, replicas, replica, bucketed)
            buffered, owned = buffered + total, owned + share
    # The buffer of weights has the gradients' layout, padding included; gradients are fp32. Of a
    # bucket's share only what belongs to parameters gets master weights and moments.
    return States(buffered * item, buffered * 4, owned * master, owned * 8)


@cache
def _buffer(
    sizes: Sequence[int], tied: int | None, replicas: int, replica: int, bucket_elements: int | None
) -> tuple[int, int]:
    """Elements of a buffer, and elements of parameters in one replica's share of its buckets.

    Megatron's `_ParamAndGradBuffer`: parameters from last to first, starts padded to 64 elements, a
    bucket's end to a multiple of 128 and of the replicas.
    """
    divisor = math.lcm(replicas, BUCKET_ALIGNMENT)
    start = bucket_start = owned = 0
    spans: list[tuple[int, int]] = []

    def close(stop: int) -> int:
        """End the bucket, count the replica's share of it; where the next one starts."""
        nonlocal bucket_start, owned
        end = round_up(stop, divisor)
        share = (end - bucket_start) // replicas
        # `divisor` makes a bucket a multiple of the replicas: all shares are equal.
        low = bucket_start + replica * share
        owned += sum(max(0, min(last, low + share) - max(first, low)) for first, last in spans)
        spans.clear()
        bucket_start = end
        return end

    # Backward passes finish gradients from the last parameter on.
    for place in reversed(range(len(sizes))):
        start = round_up(start, PARAM_ALIGNMENT)
        # The bucket of a tied parameter holds nothing else: what came before is closed first.
        if place == tied and spans:
            start = close(start)
        stop = start + sizes[place]
        spans.append((start, stop))
        full = bucket_elements is not None and stop - bucket_start >= bucket_elements
        start = close(stop) if place == tied or full else stop
    return (close(start) if spans else start), owned
