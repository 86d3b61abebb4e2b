"""Which rank holds what: tensor, pipeline and data coordinates of every rank of one model.

Invariant: this file alone knows Megatron's rank order (tensor fastest, then data, then pipeline).
Pure: no torch, no process group.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankCoords:
    """Position of one rank in the layout, each coordinate counted from 0."""

    tp: int
    pp: int
    dp: int


@dataclass(frozen=True)
class ParallelLayout:
    """A tp x pp x dp grid of ranks; `vpp` model chunks a pipeline rank (1: plain 1F1B)."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def coords(self, rank: int) -> RankCoords:
        """Coordinates of `rank` in Megatron's order `tp-cp-ep-dp-pp`."""
        assert 0 <= rank < self.world_size, f"rank {rank} outside a world of {self.world_size}"
        return RankCoords(tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp))

    def rank(self, tp: int, pp: int, dp: int) -> int:
        """Inverse of `coords`."""
        return tp + self.tp * (dp + self.dp * pp)

    def collectors(self) -> list[int]:
        """For each data-parallel rank, the rank whose outputs the driver reads: last stage, tensor rank 0."""
        return [self.rank(0, self.pp - 1, d) for d in range(self.dp)]

    def layers(self, num_layers: int, pp_rank: int, chunk: int = 0) -> range:
        """Global layer numbers of model chunk `chunk` on pipeline rank `pp_rank` (chunks interleave over ranks)."""
        per_chunk, rest = divmod(num_layers, self.pp * self.vpp)
        assert rest == 0, f"{num_layers} layers do not divide into {self.pp} x {self.vpp} stages"
        start = (chunk * self.pp + pp_rank) * per_chunk
        return range(start, start + per_chunk)

    def __str__(self) -> str:
        text = f"TP{self.tp}×PP{self.pp}×DP{self.dp}"
        return f"{text}×VPP{self.vpp}" if self.vpp > 1 else text
