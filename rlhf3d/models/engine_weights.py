"""vLLM's side of the weight table: Hugging Face tensor <-> vLLM parameter of one tensor-parallel
rank.

Invariant: each parameter has vLLM's own name, shape and order of rows, so that a copy along its
pieces is all that loading takes; the pieces tile every row of it that belongs to a token, head,
neuron or expert exactly once, and what they leave out (the padding of the vocabulary) is zero.
Names are derived from the family's Hugging Face names. Checked against the live models of vLLM 0.32
in tests/integration/test_weight_writer.py. Pure: no torch, no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf3d.models.boxes import Piece, full_box
from rlhf3d.models.family import WeightNames
from rlhf3d.models.spec import FAMILIES, ModelSpec
from rlhf3d.models.weights import LocalParam, bias_name
from rlhf3d.units import round_up

VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this many rows, whatever the number of ranks that share
them out.
"""


def engine_params(
    spec: ModelSpec, tp_size: int, tp_rank: int, expert_parallel: bool = False
) -> list[LocalParam]:
    """vLLM's parameters of one tensor-parallel rank, in vLLM's names, in forward order.

    A tied head has no entry: it is the embedding's storage. `primary` is False for copies of what
    rank 0 holds. Where ranks outnumber key-value heads, a fused QKV is primary on every rank, its
    query rows being nobody else's, although its key and value rows are on tp_size / num_kv_heads
    ranks in a row.

    Raises ValueError as `check_engine_layout` does.
    """
    check_engine_layout(spec, tp_size, expert_parallel)
    assert 0 <= tp_rank < tp_size, f"rank {tp_rank} of {tp_size}"
    table = _RankTable(spec, tp_size, tp_rank, expert_parallel)
    names = table.names
    params = [table.vocabulary(names.embedding)]
    for layer in range(spec.num_layers):
        params += table.layer(layer)
    params.append(table.replicated(names.final_norm, (spec.hidden_size,)))
    if not spec.tie_embeddings:
        params.append(table.vocabulary(names.lm_head))
    return params


def engine_vocab_size(vocab_size: int) -> int:
    """Rows of vLLM's embedding and head over all ranks."""
    return round_up(vocab_size, VOCAB_PADDING)


def check_engine_layout(spec: ModelSpec, tp_size: int, expert_parallel: bool = False) -> None:
    """Raise ValueError unless vLLM can cut the model over `tp_size` ranks.

    It names rollout.tensor_parallel_size.
    """
    assert tp_size >= 1, tp_size
    if expert_parallel and not spec.num_experts:
        raise ValueError(
            "rollout.expert_parallel true: the model is dense and has no experts to share out; set "
            "false"
        )
    wrong = _misfits(spec, tp_size, expert_parallel)
    if wrong:
        legal = [n for n in range(1, spec.num_heads + 1) if not _misfits(spec, n, expert_parallel)]
        nearest = [n for n in legal if n < tp_size][-1:] + [n for n in legal if n > tp_size][:1]
        raise ValueError(
            f"rollout.tensor_parallel_size {tp_size} does not fit this model: {'; '.join(wrong)}. "
            f"Nearest legal: {' or '.join(str(n) for n in nearest)}"
        )


def check_quantization(spec: ModelSpec, quantization: str) -> None:
    """Raise ValueError naming rollout.quantization unless engines can quantise the model."""
    if spec.num_experts and quantization != "none":
        raise ValueError(
            f"rollout.quantization = {quantization}: the model has experts, whose weights stay "
            "whole; set none"
        )


def _misfits(spec: ModelSpec, tp: int, expert_parallel: bool) -> list[str]:
    """What `tp` ranks do not share out evenly, with the arithmetic."""
    vocab = engine_vocab_size(spec.vocab_size)
    sizes = {
        "num_attention_heads": spec.num_heads,
        f"vocab_size {spec.vocab_size} padded to": vocab,
    }
    if not spec.num_experts:
        sizes["intermediate_size"] = spec.ffn_size
    elif expert_parallel:
        sizes["num_experts"] = spec.num_experts
    else:
        sizes["intermediate_size of an expert"] = spec.moe_ffn_size
    wrong = [f"{name} {size} % {tp} = {size % tp}" for name, size in sizes.items() if size % tp]
    kv_heads = spec.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        wrong.append(
            f"num_key_value_heads {kv_heads} % {tp} = {kv_heads % tp} and {tp} % {kv_heads} = "
            f"{tp % kv_heads} (heads are shared out or each copied to as many ranks)"
        )
    return wrong


def _fused(hf_name: str, module: str) -> str:
    """The parameter of vLLM's fused `module` that stands in the place of `hf_name`."""
    parent, _, leaf = hf_name.rsplit(".", 2)
    return f"{parent}.{module}.{leaf}"


@dataclass(frozen=True)
class _RankTable:
    """Builds the parameters of one rank."""

    spec: ModelSpec
    tp: int
    rank: int
    expert_parallel: bool

    @property
    def names(self) -> WeightNames:
        return FAMILIES[self.spec.family].names

    def layer(self, layer: int) -> list[LocalParam]:
        """One decoder layer."""
        spec, names = self.spec, self.names
        hidden, head = (spec.hidden_size,), (spec.head_dim,)

        def hf(template: str) -> str:
            return template.format(layer=layer)

        params = [self.replicated(hf(names.input_norm), hidden)]
        projections = [hf(names.query), hf(names.key), hf(names.value)]
        params.append(self.qkv(projections, bias=False))
        if spec.qkv_bias:
            params.append(self.qkv([bias_name(name) for name in projections], bias=True))
        if spec.qk_norm:
            assert names.query_norm and names.key_norm
            params += [
                self.replicated(hf(names.query_norm), head),
                self.replicated(hf(names.key_norm), head),
            ]
        params.append(self.columns(hf(names.attention_output), spec.num_heads * spec.head_dim))
        params.append(self.replicated(hf(names.post_attention_norm), hidden))
        if not spec.num_experts:
            return [
                *params,
                self.gate_up(hf(names.gate), hf(names.up)),
                self.columns(hf(names.down), spec.ffn_size),
            ]
        assert names.router, f"{spec.family} has experts but no name for their router"
        params.append(self.replicated(hf(names.router), (spec.num_experts, spec.hidden_size)))
        return [*params, *self.experts(layer)]

    def replicated(self, name: str, shape: tuple[int, ...]) -> LocalParam:
        """The whole tensor on every rank."""
        box = full_box(shape)
        return LocalParam(name, shape, (Piece(name, box, box),), primary=self.rank == 0)

    def vocabulary(self, name: str) -> LocalParam:
        """This rank's rows of the padded vocabulary; ranks that hold only padding have no piece."""
        spec = self.spec
        rows = engine_vocab_size(spec.vocab_size) // self.tp
        start = min(self.rank * rows, spec.vocab_size)
        stop = min(start + rows, spec.vocab_size)
        columns = (0, spec.hidden_size)
        pieces = (
            (Piece(name, ((start, stop), columns), ((0, stop - start), columns)),)
            if stop > start
            else ()
        )
        return LocalParam(name, (rows, spec.hidden_size), pieces, primary=True, tp_dim=0)

    def qkv(self, projections: Sequence[str], bias: bool) -> LocalParam:
        """This rank's query heads, then its key heads, then its value heads.

        With fewer key-value heads than ranks, each head is on tp / num_kv_heads ranks in a row.
        """
        spec, query = self.spec, projections[0]
        kv_heads = max(1, spec.num_kv_heads // self.tp)
        kv_start = self.rank * spec.num_kv_heads // self.tp
        query_heads = spec.num_heads // self.tp
        blocks = (
            (self.rank * query_heads, query_heads),
            (kv_start, kv_heads),
            (kv_start, kv_heads),
        )
        rest = () if bias else (spec.hidden_size,)
        pieces, row = [], 0
        for hf_name, (first, heads) in zip(projections, blocks, strict=True):
            start, count = first * spec.head_dim, heads * spec.head_dim
            hf_box = ((start, start + count), *full_box(rest))
            pieces.append(Piece(hf_name, hf_box, ((row, row + count), *full_box(rest))))
            row += count
        return LocalParam(
            _fused(query, "qkv_proj"), (row, *rest), tuple(pieces), primary=True, tp_dim=0
        )

    def gate_up(self, gate: str, up: str) -> LocalParam:
        """This rank's rows of gate, then those of up."""
        share, columns = self.spec.ffn_size // self.tp, (0, self.spec.hidden_size)
        start = self.rank * share
        pieces = tuple(
            Piece(
                hf_name, ((start, start + share), columns), ((i * share, (i + 1) * share), columns)
            )
            for i, hf_name in enumerate((gate, up))
        )
        shape = (2 * share, self.spec.hidden_size)
        return LocalParam(_fused(gate, "gate_up_proj"), shape, pieces, primary=True, tp_dim=0)

    def experts(self, layer: int) -> list[LocalParam]:
        """w13 [experts, gate then up rows, hidden] and w2 [experts, hidden, columns] of one layer.

        Every rank holds a share of each expert, or (`expert_parallel`) whole experts in a row: rank
        r of n those from r * experts / n. A piece's `hf_box` has two dimensions and its `local_box`
        the expert's slot in front of them.
        """
        names, hidden = self.names, self.spec.hidden_size
        count, share = self.spec.num_experts, self.spec.moe_ffn_size
        if self.expert_parallel:
            count //= self.tp
        else:
            share //= self.tp
        first, start = (self.rank * count, 0) if self.expert_parallel else (0, self.rank * share)
        cut, whole = (start, start + share), (0, hidden)
        gate_up, down = [], []
        for slot in range(count):
            gate, up, down_name = (
                template.format(layer=layer, expert=first + slot)
                for template in (names.gate, names.up, names.down)
            )
            expert = (slot, slot + 1)
            gate_up.append(Piece(gate, (cut, whole), (expert, (0, share), whole)))
            gate_up.append(Piece(up, (cut, whole), (expert, (share, 2 * share), whole)))
            down.append(Piece(down_name, (whole, cut), (expert, whole, (0, share))))
        prefix = names.gate.split("{expert}")[0].format(layer=layer) + "routed_experts."
        shapes = {"w13_weight": (count, 2 * share, hidden), "w2_weight": (count, hidden, share)}
        cut_dims = (0, 0) if self.expert_parallel else (1, 2)
        return [
            LocalParam(prefix + name, shape, tuple(pieces), primary=True, tp_dim=dim)
            for (name, shape), pieces, dim in zip(
                shapes.items(), (gate_up, down), cut_dims, strict=True
            )
        ]

    def columns(self, name: str, size: int) -> LocalParam:
        """This rank's share of the columns of a [hidden, size] tensor."""
        share, rows = size // self.tp, (0, self.spec.hidden_size)
        start = self.rank * share
        piece = Piece(name, (rows, (start, start + share)), (rows, (0, share)))
        return LocalParam(name, (self.spec.hidden_size, share), (piece,), primary=True, tp_dim=1)
