"""The one weight table: Hugging Face tensor <-> Megatron parameter, as pairs of equal index boxes.

Invariant: for any layout, the pieces of primary parameters over all ranks tile every Hugging Face
tensor exactly once, and the pieces of each parameter tile that parameter exactly once, except for
the rows that pad the vocabulary. Loading, export and the reshard plan are all read off this table;
no other file knows a parameter name. Pure: no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf3d.models.boxes import Box, Piece
from rlhf3d.models.cuts import (
    LocalParam,
    Share,
    cut_columns,
    cut_rows,
    cut_vocabulary,
    replicated,
)
from rlhf3d.models.family import WeightNames
from rlhf3d.models.spec import FAMILIES, ModelSpec, padded_vocab_size
from rlhf3d.parallel.layout import ParallelLayout, RankCoords, SpecStyle

Head = Literal["lm", "value", "none"]
"""What follows the trunk: vocabulary head, value head [1, hidden], or nothing."""

VALUE_HEAD = "value_head.weight"
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?$")


def hf_tensors(spec: ModelSpec, head: Head) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the model.

    With tied embeddings there is no vocabulary head.
    """
    names = FAMILIES[spec.family].names
    tensors: dict[str, tuple[int, ...]] = {names.embedding: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        # Dense layers' MLP is among these; experts' names need their number too.
        tensors |= {name.format(layer=layer): shape for name, shape in _layer_tensors(spec, names)}
        for expert in range(spec.num_experts):
            tensors |= {
                name.format(layer=layer, expert=expert): shape
                for name, shape in _mlp_tensors(spec.moe_ffn_size, spec.hidden_size, names)
            }
    tensors[names.final_norm] = (spec.hidden_size,)
    if head == "lm" and not spec.tie_embeddings:
        tensors[names.lm_head] = (spec.vocab_size, spec.hidden_size)
    if head == "value":
        tensors[names.value_head] = (1, spec.hidden_size)
    return tensors


def num_weights(spec: ModelSpec, head: Head) -> int:
    """Return how many numbers the tensors of a model hold."""
    return sum(math.prod(shape) for shape in hf_tensors(spec, head).values())


def check_hf_tensors(
    found: Mapping[str, tuple[int, ...]], spec: ModelSpec, head: Head, source: Path | str
) -> None:
    """Raise ValueError naming model.path unless a folder's tensors are the model's.

    `found`: name -> shape. The value head may be absent (it then starts at zero); the other
    role's head and a written-out tied head may be present.
    """
    # First: where there is one reason, a list of missing tensors would hide it.
    refuse_odd_names(found, spec, head, source)
    names = FAMILIES[spec.family].names
    wanted = hf_tensors(spec, head)
    # A critic may start from a language model, and a policy from a folder with a value head.
    unused = set(found) - set(wanted) - {names.lm_head, names.value_head}
    problems = {
        "lacks": sorted(set(wanted) - set(found) - {names.value_head}),
        # Old folders hold this buffer, which is computed from config.json.
        "holds tensors that the model does not use:": sorted(
            n for n in unused if not n.endswith("rotary_emb.inv_freq")
        ),
        "has wrong shapes:": [
            f"{n} {found[n]} for {s}" for n, s in wanted.items() if n in found and found[n] != s
        ],
    }
    for problem, tensors in problems.items():
        if tensors:
            raise ValueError(
                f"model.path: {source} {problem} {', '.join(tensors[:5])} ({len(tensors)} in all), "
                f"so its weights and config.json do not belong together; download both again"
            )


def refuse_odd_names(found: Iterable[str], spec: ModelSpec, head: Head, source: Path | str) -> None:
    """Raise ValueError where many tensors, or the head alone, are absent for one reason.

    Experts in one tensor a layer are how transformers 5 holds them, names without `model.` those of
    its base models.
    """
    names, found = FAMILIES[spec.family].names, set(found)
    absent = set(hf_tensors(spec, head)) - found
    if head == "lm" and names.value_head in found and names.lm_head not in found:
        raise ValueError(
            f"model.path: {source} is a sequence classifier ({names.value_head}), not a language "
            "model: give the model that it was made from"
        )
    # Nothing else is absent, so this is no cut-off download but a head that was never written.
    if absent == {names.lm_head}:
        raise ValueError(
            f"model.path: {source} lacks {names.lm_head}, and its config.json does not have "
            "tie_word_embeddings true: set it where head and embedding are one, or download the "
            "weights again"
        )
    other = [name for name in found if name.endswith(names.embedding.removeprefix("model."))]
    if names.embedding in absent and other:
        raise ValueError(
            f"model.path: {source} names its embedding {other[0]}, not {names.embedding}, as a "
            "wrapper or a base model saves it: rename its tensors, or save the causal language "
            "model itself"
        )
    fused = next((name for name in found if _FUSED_EXPERTS.search(name)), None)
    if fused is not None:
        raise ValueError(
            f"model.path: {source} holds all experts of a layer in one tensor ({fused}); one "
            "tensor an expert is needed: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, "
            "save_original_format=True) writes them so"
        )


def _layer_tensors(spec: ModelSpec, names: WeightNames) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = spec.hidden_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield names.input_norm, (hidden,)
    for name, rows in ((names.query, q_rows), (names.key, kv_rows), (names.value, kv_rows)):
        yield name, (rows, hidden)
        if spec.qkv_bias:
            yield bias_name(name), (rows,)
    if spec.qk_norm:
        assert names.query_norm and names.key_norm, f"{spec.family} has QK-norm but no names for it"
        yield names.query_norm, (spec.head_dim,)
        yield names.key_norm, (spec.head_dim,)
    yield names.attention_output, (hidden, q_rows)
    yield names.post_attention_norm, (hidden,)
    if spec.num_experts:
        assert names.router, f"{spec.family} has experts but no name for their router"
        yield names.router, (spec.num_experts, hidden)
    else:
        yield from _mlp_tensors(spec.ffn_size, hidden, names)


def _mlp_tensors(
    ffn: int, hidden: int, names: WeightNames
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield names.gate, (ffn, hidden)
    yield names.up, (ffn, hidden)
    yield names.down, (hidden, ffn)


def bias_name(weight_name: str) -> str:
    """Return the name of the bias that goes with a weight."""
    return weight_name.removesuffix("weight") + "bias"


def local_params(
    spec: ModelSpec,
    layout: ParallelLayout,
    coords: RankCoords,
    chunk: int = 0,
    head: Head = "lm",
    spec_style: SpecStyle = "local",
) -> list[LocalParam]:
    """The parameters of a model chunk on the rank at `coords`.

    They have Megatron's own names and order. `layout` must have passed `check_layout`.
    """
    table = _RankTable(spec, layout, coords)
    names = table.names
    first = coords.pp == 0 and chunk == 0
    last = coords.pp == layout.pp - 1 and chunk == layout.vpp - 1
    params: list[LocalParam] = []
    if first:
        params.append(table.vocabulary("embedding.word_embeddings.weight", names.embedding))
    for local, layer in enumerate(layout.layers(spec.num_layers, coords.pp, chunk)):
        params += table.layer(f"decoder.layers.{local}.", layer, spec_style)
    if last:
        norm = "decoder.final_layernorm.weight"
        params.append(table.replicated(norm, names.final_norm, (spec.hidden_size,)))
        if head == "value":
            params.append(table.replicated(VALUE_HEAD, names.value_head, (1, spec.hidden_size)))
        # On a single stage the tied head is the embedding parameter itself.
        if head == "lm" and not (spec.tie_embeddings and first):
            tied = spec.tie_embeddings
            source = names.embedding if tied else names.lm_head
            # A tied embedding is exported by the first stage alone.
            params.append(table.vocabulary("output_layer.weight", source, exported=not tied))
    return params


@dataclass(frozen=True)
class _RankTable:
    """Builds the parameters of one rank."""

    spec: ModelSpec
    layout: ParallelLayout
    coords: RankCoords

    @property
    def names(self) -> WeightNames:
        return FAMILIES[self.spec.family].names

    @property
    def share(self) -> Share:
        """Of what tensor-parallel ranks share out."""
        return Share(self.coords.tp, self.layout.tp)

    @property
    def primary(self) -> bool:
        """Whether this rank's share is the one to export."""
        return self.coords.first_replica

    def layer(self, prefix: str, layer: int, style: SpecStyle) -> Iterator[LocalParam]:
        """One decoder layer: `prefix` is its local name, `layer` its global number."""
        spec, names = self.spec, self.names
        hidden, head = (spec.hidden_size,), (spec.head_dim,)
        attention = prefix + "self_attention."
        qkv_norm, mlp_norm = _NORM_NAMES[style]
        if spec.num_experts:
            mlp_norm = "pre_mlp_layernorm.weight"  # the router reads it too, so nothing fuses it

        def hf(template: str | None) -> str:
            assert template, f"{spec.family} lacks the name of a weight that its layers have"
            return template.format(layer=layer)

        # The order of the `local` layers: Megatron makes linear_proj before linear_qkv.
        yield self.replicated(prefix + qkv_norm, hf(names.input_norm), hidden)
        output = (spec.hidden_size, spec.num_heads * spec.head_dim)
        name = attention + "linear_proj.weight"
        yield cut_columns(name, hf(names.attention_output), output, self.share, self.primary)
        yield self.qkv(attention + "linear_qkv.weight", layer, bias=False)
        if spec.qkv_bias:
            yield self.qkv(attention + "linear_qkv.bias", layer, bias=True)
        if spec.qk_norm:
            yield self.replicated(attention + "q_layernorm.weight", hf(names.query_norm), head)
            yield self.replicated(attention + "k_layernorm.weight", hf(names.key_norm), head)
        yield self.replicated(prefix + mlp_norm, hf(names.post_attention_norm), hidden)
        if spec.num_experts:
            router = (spec.num_experts, spec.hidden_size)
            yield self.replicated(prefix + "mlp.router.weight", hf(names.router), router)
            yield from self.experts(prefix + "mlp.", layer, style)
        else:
            yield from self.mlp(prefix + "mlp.", hf(names.gate), hf(names.up), hf(names.down))

    def replicated(self, name: str, hf_name: str, shape: tuple[int, ...]) -> LocalParam:
        """The complete tensor on every tensor-parallel rank, exported by the first."""
        return replicated(name, hf_name, shape, self.primary and self.coords.tp == 0)

    def vocabulary(self, name: str, hf_name: str, exported: bool = True) -> LocalParam:
        """This rank's share of the rows of a [vocabulary, hidden] tensor."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        rows = padded_vocab_size(self.spec, self.layout)
        return cut_vocabulary(name, hf_name, shape, rows, self.share, exported and self.primary)

    def mlp(self, prefix: str, gate: str, up: str, down: str) -> Iterator[LocalParam]:
        """A dense layer's MLP: this rank's rows of gate and up stacked, its columns of down."""
        ffn, hidden = self.spec.ffn_size, self.spec.hidden_size
        fc1, fc2 = prefix + "linear_fc1.weight", prefix + "linear_fc2.weight"
        # Gate above up on each rank: Megatron halves its own rows of fc1's output for SwiGLU.
        yield cut_rows(fc1, (gate, up), (ffn, hidden), self.share, self.primary)
        yield cut_columns(fc2, down, (hidden, ffn), self.share, self.primary)

    def experts(self, prefix: str, layer: int, style: SpecStyle) -> Iterator[LocalParam]:
        """Each expert of this rank, complete: gate and up stacked, and down."""
        names, everything = self.names, Share(0, 1)
        ffn, hidden = self.spec.moe_ffn_size, self.spec.hidden_size
        count = self.spec.num_experts // self.layout.ep
        # Replicas of experts are counted apart: tensor ranks may be replicas too.
        primary = self.layout.expert_replica(self.coords) == 0
        for local in range(count):
            # Megatron gives each expert-parallel rank experts with consecutive numbers.
            expert = self.coords.ep * count + local
            gate = names.gate.format(layer=layer, expert=expert)
            up = names.up.format(layer=layer, expert=expert)
            down = names.down.format(layer=layer, expert=expert)
            fc1 = prefix + _EXPERT_NAMES[style].format(expert=local, linear=1)
            fc2 = prefix + _EXPERT_NAMES[style].format(expert=local, linear=2)
            stacked = cut_rows(fc1, (gate, up), (ffn, hidden), everything, primary)
            # `cut_rows` says that rows are shared out; here one rank of one holds them all.
            yield replace(stacked, tp_dim=None, expert=True)
            yield replace(replicated(fc2, down, (hidden, ffn), primary), expert=True)

    def qkv(self, name: str, layer: int, bias: bool) -> LocalParam:
        """Fused attention input of this rank's KV groups.

        Of each group its query heads, its key head and its value head, in Megatron's order.
        """
        spec, names = self.spec, self.names
        query_rows = spec.num_heads // spec.num_kv_heads * spec.head_dim
        rest: Box = () if bias else ((0, spec.hidden_size),)
        parts = (
            (names.query, query_rows),
            (names.key, spec.head_dim),
            (names.value, spec.head_dim),
        )
        pieces, row = [], 0
        for group in range(*self.share.of(spec.num_kv_heads)):
            for template, rows in parts:
                hf_name = (bias_name(template) if bias else template).format(layer=layer)
                # Group g has the g-th part of queries, keys and values alike.
                hf_rows, local_rows = (group * rows, (group + 1) * rows), (row, row + rows)
                pieces.append(Piece(hf_name, (hf_rows, *rest), (local_rows, *rest)))
                row += rows
        shape = (row,) if bias else (row, spec.hidden_size)
        return LocalParam(name, shape, tuple(pieces), self.primary, tp_dim=0)


_NORM_NAMES: dict[SpecStyle, tuple[str, str]] = {
    "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    # Transformer Engine fuses a norm into the linear layer behind it, which owns its weight.
    "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
}
_EXPERT_NAMES: dict[SpecStyle, str] = {
    "local": "experts.local_experts.{expert}.linear_fc{linear}.weight",
    # One grouped linear layer for all local experts, a parameter for each.
    "te": "experts.linear_fc{linear}.weight{expert}",
}
