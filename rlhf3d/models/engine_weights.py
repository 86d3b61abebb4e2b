"""The weight table's vLLM side: Hugging Face tensor <-> parameter of one vLLM rank.

Invariant: each parameter has vLLM's own name, shape and order of rows, so that a copy along its
pieces is all that loading takes; the pieces tile every row of it that belongs to a token, head,
neuron or expert exactly once, and what they leave out (the padding of the vocabulary) is zero.
Names are derived from the family's Hugging Face names. Checked against the live models of vLLM 0.32
in tests/integration/test_weight_writer.py. Pure: no torch, no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf3d.models.boxes import Piece, full_box
from rlhf3d.models.cuts import (
    LocalParam,
    Share,
    cut_columns,
    cut_rows,
    cut_vocabulary,
    replicated,
)
from rlhf3d.models.family import WeightNames
from rlhf3d.models.spec import FAMILIES, ModelSpec
from rlhf3d.models.weights import bias_name
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
        # More ranks than query heads never fit.
        legal = [n for n in range(1, spec.num_heads + 1) if not _misfits(spec, n, expert_parallel)]
        nearest = [n for n in legal if n < tp_size][-1:] + [n for n in legal if n > tp_size][:1]
        raise ValueError(
            f"rollout.tensor_parallel_size {tp_size} does not fit this model: {'; '.join(wrong)}. "
            f"Nearest legal: {' or '.join(str(n) for n in nearest)}"
        )


def check_quantization(spec: ModelSpec, quantization: str) -> None:
    """Raise ValueError naming rollout.quantization unless engines can quantize the model."""
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
    # `….self_attn.q_proj.weight` -> `….self_attn`, `weight`.
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

    @property
    def share(self) -> Share:
        """Of what tensor-parallel ranks share out."""
        return Share(self.rank, self.tp)

    def layer(self, layer: int) -> Iterator[LocalParam]:
        """One decoder layer."""
        spec, names = self.spec, self.names
        hidden, head = (spec.hidden_size,), (spec.head_dim,)

        def hf(template: str | None) -> str:
            assert template, f"{spec.family} lacks the name of a weight that its layers have"
            return template.format(layer=layer)

        yield self.replicated(hf(names.input_norm), hidden)
        projections = [hf(names.query), hf(names.key), hf(names.value)]
        yield self.qkv(projections, bias=False)
        if spec.qkv_bias:
            yield self.qkv([bias_name(name) for name in projections], bias=True)
        if spec.qk_norm:
            yield self.replicated(hf(names.query_norm), head)
            yield self.replicated(hf(names.key_norm), head)
        yield self.columns(hf(names.attention_output), spec.num_heads * spec.head_dim)
        yield self.replicated(hf(names.post_attention_norm), hidden)
        if spec.num_experts:
            yield self.replicated(hf(names.router), (spec.num_experts, spec.hidden_size))
            yield from self.experts(layer)
            return
        gate, up, mlp = hf(names.gate), hf(names.up), (spec.ffn_size, spec.hidden_size)
        fused = _fused(gate, "gate_up_proj")
        # vLLM's MergedColumnParallelLinear: this rank's rows of gate, then its rows of up.
        yield cut_rows(fused, (gate, up), mlp, self.share, primary=True)
        yield self.columns(hf(names.down), spec.ffn_size)

    def replicated(self, name: str, shape: tuple[int, ...]) -> LocalParam:
        """The complete tensor on every rank."""
        return replicated(name, name, shape, primary=self.rank == 0)

    def vocabulary(self, name: str) -> LocalParam:
        """This rank's rows of the padded vocabulary."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        rows = engine_vocab_size(self.spec.vocab_size)
        return cut_vocabulary(name, name, shape, rows, self.share, primary=True)

    def columns(self, name: str, size: int) -> LocalParam:
        """This rank's columns of a [hidden, size] tensor."""
        return cut_columns(name, name, (self.spec.hidden_size, size), self.share, primary=True)

    def qkv(self, projections: Sequence[str], bias: bool) -> LocalParam:
        """This rank's query heads, then its key heads, then its value heads.

        With fewer key-value heads than ranks, each head is on tp / num_kv_heads ranks in a row.
        """
        spec, query = self.spec, projections[0]
        # Either number divides the other (`_misfits`), so both lines hold with copied heads too.
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

    def experts(self, layer: int) -> list[LocalParam]:
        """w13 [experts, gate then up rows, hidden] and w2 [experts, hidden, columns] of one layer.

        Every rank holds a share of each expert, or (`expert_parallel`) complete experts in a row:
        rank r of n those from r * experts / n. A piece's `hf_box` has two dimensions and its
        `local_box` the expert's slot in front of them.
        """
        names, hidden = self.names, self.spec.hidden_size
        count, share = self.spec.num_experts, self.spec.moe_ffn_size
        if self.expert_parallel:
            count //= self.tp
            # The ranks share out the first dimension of w13 and w2, the experts.
            first, start, cut_dims = self.rank * count, 0, (0, 0)
        else:
            share //= self.tp
            # They share out w13's rows and w2's columns, which are an expert's neurons.
            first, start, cut_dims = 0, self.rank * share, (1, 2)
        cut, all_hidden = (start, start + share), (0, hidden)
        w13: list[Piece] = []
        w2: list[Piece] = []
        for slot in range(count):
            number, place = first + slot, (slot, slot + 1)
            gate = names.gate.format(layer=layer, expert=number)
            up = names.up.format(layer=layer, expert=number)
            down = names.down.format(layer=layer, expert=number)
            w13.append(Piece(gate, (cut, all_hidden), (place, (0, share), all_hidden)))
            w13.append(Piece(up, (cut, all_hidden), (place, (share, 2 * share), all_hidden)))
            w2.append(Piece(down, (all_hidden, cut), (place, all_hidden, (0, share))))
        # `….experts.`: the module is the one that holds the experts in the Hugging Face names.
        prefix = names.gate.split("{expert}")[0].format(layer=layer) + "routed_experts."
        w13_shape, w2_shape = (count, 2 * share, hidden), (count, hidden, share)
        w13_dim, w2_dim = cut_dims
        return [
            LocalParam(prefix + "w13_weight", w13_shape, tuple(w13), primary=True, tp_dim=w13_dim),
            LocalParam(prefix + "w2_weight", w2_shape, tuple(w2), primary=True, tp_dim=w2_dim),
        ]
