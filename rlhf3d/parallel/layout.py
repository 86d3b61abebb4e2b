"""Which rank holds what: tensor, context, pipeline, data and expert coordinates of every rank.

Invariant: this file alone knows Megatron's rank order (tensor fastest, then context, data,
pipeline; within a stage expert-parallel groups are runs of consecutive ranks).
Pure: no torch, no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SpecStyle = Literal["local", "te"]
"""Whose parameter names a Megatron layer has: its own, or Transformer Engine's (norms fused into
the next linear layer, experts multiplied as one group)."""
Recompute = Literal["none", "selective", "full"]
"""What of each layer the backward pass computes again."""
PlatformKind = Literal["cpu", "cuda", "as_gpu"]
"""CPU, NVIDIA GPUs, or CPU under the order and rules of GPUs."""
TrainingDtype = Literal["bfloat16", "float32"]
"""What a model is trained in."""


@dataclass(frozen=True)
class RankCoords:
    """Position of one rank in the layout, each coordinate counted from 0."""

    tp: int
    pp: int
    dp: int
    ep: int = 0
    cp: int = 0

    @property
    def first_replica(self) -> bool:
        """Whether this rank is the first of those with the same weights."""
        return self.dp == 0 and self.cp == 0


@dataclass(frozen=True)
class ParallelLayout:
    """A tp x pp x dp x cp grid of ranks; `vpp` model chunks per pipeline rank (1: plain 1F1B).

    The `cp` ranks of a data-parallel replica hold the same weights and share out each sequence. The
    ranks of a stage also form groups of `ep` that share out the experts of a mixture of experts:
    each expert is complete on one rank of the group. `first_stage_layers` and `last_stage_layers`
    (of all chunks together) make the pipeline uneven; the other stages share the remaining layers
    equally.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1
    ep: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    cp: int = 1

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.stage_size * self.pp

    @property
    def stage_size(self) -> int:
        """The number of ranks of a pipeline stage."""
        return self.tp * self.replicas

    @property
    def replicas(self) -> int:
        """The number of ranks with the same dense weights."""
        return self.dp * self.cp

    def coords(self, rank: int) -> RankCoords:
        """Return the coordinates of `rank` in Megatron's order `tp-cp-ep-dp-pp`."""
        assert 0 <= rank < self.world_size, f"rank {rank} outside a world of {self.world_size}"
        pp, place = divmod(rank, self.stage_size)
        replica, tp = divmod(place, self.tp)
        dp, cp = divmod(replica, self.cp)
        return RankCoords(tp=tp, pp=pp, dp=dp, ep=place % self.ep, cp=cp)

    def rank(self, tp: int, pp: int, dp: int, cp: int = 0) -> int:
        """Return the rank at these coordinates: the inverse of `coords`."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def replica(self, coords: RankCoords) -> int:
        """Return which copy of the dense weights a rank holds, 0 … cp x dp - 1."""
        return coords.cp + self.cp * coords.dp

    def expert_replica(self, coords: RankCoords) -> int:
        """Return which copy of its experts a rank holds, 0 … tp x cp x dp / ep - 1.

        It is Megatron's expert-data-parallel rank.
        """
        return (coords.tp + self.tp * self.replica(coords)) // self.ep

    def collectors(self) -> list[int]:
        """Return, for each data-parallel rank, the rank whose outputs the driver reads.

        It is on the last stage, where the outputs are, with tensor and context rank 0.
        """
        return [self.rank(0, self.pp - 1, dp) for dp in range(self.dp)]

    def layers(self, num_layers: int, pp_rank: int, chunk: int = 0) -> range:
        """Return the global layer numbers of a model chunk of a pipeline rank.

        Chunks interleave over ranks: chunk 1 of rank 0 follows chunk 0 of the last rank.
        """
        sizes = self.stage_layers(num_layers)
        assert sizes is not None, f"{num_layers} layers do not divide into {self} stages"
        per_chunk = [size // self.vpp for size in sizes]
        start = chunk * sum(per_chunk) + sum(per_chunk[:pp_rank])
        return range(start, start + per_chunk[pp_rank])

    def stage_layers(self, num_layers: int) -> list[int] | None:
        """Return the layers of each pipeline rank, all its chunks together.

        None where they do not divide.
        """
        first = [] if self.first_stage_layers is None else [self.first_stage_layers]
        last = [] if self.last_stage_layers is None else [self.last_stage_layers]
        stages = self.pp - len(first) - len(last)
        layers = num_layers - sum(first) - sum(last)
        # Without further stages the layers given must be all of them.
        each, rest = divmod(layers, stages) if stages > 0 else (0, layers)
        if stages < 0 or rest:
            return None
        sizes = [*first, *[each] * stages, *last]
        fits = all(size > 0 and size % self.vpp == 0 for size in sizes)
        return sizes if fits else None

    def __str__(self) -> str:
        uneven = {"first": self.first_stage_layers, "last": self.last_stage_layers}
        given = [f"{name} {layers}" for name, layers in uneven.items() if layers is not None]
        stages = f"({', '.join(given)})" if given else ""
        text = f"TP{self.tp}×PP{self.pp}{stages}×DP{self.dp}"
        for name, size in (("CP", self.cp), ("VPP", self.vpp), ("EP", self.ep)):
            if size > 1:
                text += f"×{name}{size}"
        return text


def ranges(numbers: Sequence[int], most: int = 3) -> str:
    """Return ascending numbers of ranks as text: `3`, `0-3`, `0-1, 4-5`; at most `most` runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:most]]
    more = ["…"] if len(runs) > most else []
    return ", ".join([*shown, *more])
