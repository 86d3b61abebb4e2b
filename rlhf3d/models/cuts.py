"""How a rank's parameter is cut out of Hugging Face tensors: complete, by rows, by columns.

Invariant: each function returns the parameter of one rank of `ranks` that hold equal shares; it
knows sizes and names, and nothing of Megatron, vLLM or a model. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf3d.models.boxes import Piece, full_box


@dataclass(frozen=True)
class LocalParam:
    """One parameter of one model chunk on one rank."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    primary: bool
    """Whether this rank's copy is the one to export: False for data-parallel replicas (of experts:
    those of expert-data-parallel rank 1 and up), for tensor-parallel replicas (norms, router, value
    head) off tensor rank 0, and for the last stage's copy of tied embeddings.
    """
    tp_dim: int | None = None
    """Dimension that the tensor-parallel ranks share out; None where each holds all of it."""
    expert: bool = False
    """A weight of one expert: complete on one rank of each expert-parallel group."""


@dataclass(frozen=True)
class Share:
    """One rank's part of what `ranks` tensor-parallel ranks share out equally."""

    rank: int
    ranks: int

    def of(self, size: int) -> tuple[int, int]:
        """(start, stop) of this rank's part of `size` rows or columns, which `ranks` divides."""
        part = size // self.ranks
        return self.rank * part, (self.rank + 1) * part


def replicated(name: str, hf_name: str, shape: tuple[int, ...], primary: bool) -> LocalParam:
    """The complete tensor on every rank."""
    box = full_box(shape)
    return LocalParam(name, shape, (Piece(hf_name, box, box),), primary)


def cut_columns(
    name: str, hf_name: str, shape: tuple[int, int], share: Share, primary: bool
) -> LocalParam:
    """A share of the columns of a [rows, columns] tensor."""
    # In the tensor; in the parameter the same columns begin at 0.
    rows, columns = (0, shape[0]), share.of(shape[1])
    width = columns[1] - columns[0]
    piece = Piece(hf_name, (rows, columns), (rows, (0, width)))
    return LocalParam(name, (shape[0], width), (piece,), primary, tp_dim=1)


def cut_rows(
    name: str, hf_names: Sequence[str], shape: tuple[int, int], share: Share, primary: bool
) -> LocalParam:
    """A share of the rows of each of several [rows, columns] tensors, one below the other."""
    start, stop = share.of(shape[0])
    columns, height = (0, shape[1]), stop - start
    pieces = []
    for number, hf_name in enumerate(hf_names):
        place = (number * height, (number + 1) * height)
        pieces.append(Piece(hf_name, ((start, stop), columns), (place, columns)))
    return LocalParam(name, (len(pieces) * height, shape[1]), tuple(pieces), primary, tp_dim=0)


def cut_vocabulary(
    name: str, hf_name: str, shape: tuple[int, int], padded_rows: int, share: Share, primary: bool
) -> LocalParam:
    """A share of the rows of a [vocabulary, hidden] tensor that is padded to `padded_rows`.

    A rank that holds nothing but padding has no piece.
    """
    start, stop = share.of(padded_rows)
    # Negative where the share begins behind the last token.
    real, columns = min(stop, shape[0]) - start, (0, shape[1])
    pieces: tuple[Piece, ...] = ()
    if real > 0:
        pieces = (Piece(hf_name, ((start, start + real), columns), ((0, real), columns)),)
    return LocalParam(name, (stop - start, shape[1]), pieces, primary, tp_dim=0)
