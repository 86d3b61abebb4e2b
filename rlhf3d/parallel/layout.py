"""Which rank holds what: tensor, context, pipeline, data and expert coordinates of every rank of one model.

Invariant: this file alone knows Megatron's rank order (tensor fastest, then context, data, pipeline; within a stage
expert-parallel groups are runs of consecutive ranks).
Pure: no torch, no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SpecStyle = Literal["local", "te"]
"""Whose parameter names a Megatron layer has: its own, or Transformer Engine's (norms fused into the
next linear layer, experts multiplied as one group)."""
Recompute = Literal["none", "selective", "full"]
PlatformKind = Literal["cpu", "cuda", "as_gpu"]
TrainingDtype = Literal["bfloat16", "float32"]
"""What of each layer the backward pass computes again."""


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
    """A tp x pp x dp x cp grid of ranks; `vpp` model chunks a pipeline rank (1: plain 1F1B).

    The `cp` ranks of a data-parallel replica hold the same weights and share out each sequence. The ranks of a stage
    also form groups of `ep` that share out the experts of a mixture of experts, each expert whole on one rank of the
    group. `first_stage_layers` and `last_stage_layers` (of all chunks together) make
    the pipeline uneven; the other stages share the remaining layers equally.
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
        """Number of ranks."""
        return self.stage_size * self.pp

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.tp * self.replicas

    @property
    def replicas(self) -> int:
        """Ranks with the same weights (dense ones)."""
        return self.dp * self.cp

    def coords(self, rank: int) -> RankCoords:
        """Coordinates of `rank` in Megatron's order `tp-cp-ep-dp-pp`."""
        assert 0 <= rank < self.world_size, f"rank {rank} outside a world of {self.world_size}"
        pp, place = divmod(rank, self.stage_size)
        replica, tp = divmod(place, self.tp)
        dp, cp = divmod(replica, self.cp)
        return RankCoords(tp=tp, pp=pp, dp=dp, ep=place % self.ep, cp=cp)

    def rank(self, tp: int, pp: int, dp: int, cp: int = 0) -> int:
        """Inverse of `coords`."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def replica(self, coords: RankCoords) -> int:
        """Which copy of the dense weights the rank at `coords` holds, 0 … cp x dp - 1."""
        return coords.cp + self.cp * coords.dp

    def expert_replica(self, coords: RankCoords) -> int:
        """Which copy of its experts the rank at `coords` holds, 0 … tp x cp x dp / ep - 1: its expert-data-parallel
        rank."""
        return (coords.tp + self.tp * self.replica(coords)) // self.ep

    def collectors(self) -> list[int]:
        """For each data-parallel rank, whose outputs the driver reads: last stage, tensor and context rank 0."""
        return [self.rank(0, self.pp - 1, d) for d in range(self.dp)]

    def layers(self, num_layers: int, pp_rank: int, chunk: int = 0) -> range:
        """Global layer numbers of model chunk `chunk` on pipeline rank `pp_rank` (chunks interleave over ranks)."""
        sizes = self.stage_layers(num_layers)
        assert sizes is not None, f"{num_layers} layers do not divide into {self} stages"
        per_chunk = [size // self.vpp for size in sizes]
        start = chunk * sum(per_chunk) + sum(per_chunk[:pp_rank])
        return range(start, start + per_chunk[pp_rank])

    def stage_layers(self, num_layers: int) -> list[int] | None:
        """Layers of each pipeline rank, all its chunks together; None where they do not divide."""
        first, last = self.first_stage_layers, self.last_stage_layers
        middle_stages = self.pp - (first is not None) - (last is not None)
        middle_layers = num_layers - (first or 0) - (last or 0)
        if middle_stages < 0 or (
            middle_layers if middle_stages == 0 else middle_layers % middle_stages
        ):
            return None
        middle = [middle_layers // middle_stages] * middle_stages if middle_stages else []
        sizes = [*([] if first is None else [first]), *middle, *([] if last is None else [last])]
        return sizes if all(size > 0 and size % self.vpp == 0 for size in sizes) else None

    def __str__(self) -> str:
        uneven = {"first": self.first_stage_layers, "last": self.last_stage_layers}
        given = ", ".join(
            f"{name} {layers}" for name, layers in uneven.items() if layers is not None
        )
        text = f"TP{self.tp}×PP{self.pp}{f'({given})' if given else ''}×DP{self.dp}"
        return text + "".join(
            f"×{name}{n}"
            for name, n in (("CP", self.cp), ("VPP", self.vpp), ("EP", self.ep))
            if n > 1
        )


def ranges(numbers: Sequence[int], most: int = 3) -> str:
    """Ascending numbers of ranks for people: `3`, `0-3`, `0-1, 4-5`; at most so many runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:most]
    )
    return shown + (", …" if len(runs) > most else "")
