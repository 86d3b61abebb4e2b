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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf3d.models.boxes import Box, Piece, full_box
from rlhf3d.models.family import WeightNames
from rlhf3d.models.spec import FAMILIES, ModelSpec, padded_vocab_size
from rlhf3d.parallel.layout import ParallelLayout, RankCoords, SpecStyle

Head = Literal["lm", "value", "none"]
"""What follows the trunk: vocabulary head, value head [1, hidden], or nothing."""

VALUE_HEAD = "value_head.weight"
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?$")


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


def hf_tensors(spec: ModelSpec, head: Head) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the model (tied embeddings: no vocabulary
    head).
    """
    names = FAMILIES[spec.family].names
    tensors: dict[str, tuple[int, ...]] = {names.embedding: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
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
    """Raise ValueError naming model.path unless the folder's tensors (name -> shape) are the
    model's.

    The value head may be absent (it then starts at zero); the other role's head and a written-out
    tied head may be present.
    """
    refuse_odd_names(found, spec, head, source)
    names = FAMILIES[spec.family].names
    wanted = hf_tensors(spec, head)
    unused = set(found) - set(wanted) - {names.lm_head, names.value_head}
    problems = {
        "lacks": sorted(set(wanted) - set(found) - {names.value_head}),
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
    """Raise ValueError naming model.path where one reason stands behind many tensors, or the head
    alone, being absent.

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
    """The parameters of model chunk `chunk` on the rank at `coords`, under Megatron's own names and
    in its order.

    `layout` must have passed `check_layout`.
    """
    table = _RankTable(spec, layout, coords)
    layers = layout.layers(spec.num_layers, coords.pp, chunk)
    names = table.names
    first = coords.pp == 0 and chunk == 0
    last = coords.pp == layout.pp - 1 and chunk == layout.vpp - 1
    params: list[LocalParam] = []
    if first:
        params.append(table.vocabulary("embedding.word_embeddings.weight", names.embedding))
    for local, layer in enumerate(layers):
        params += table.layer(f"decoder.layers.{local}.", layer, spec_style)
    if last:
        params.append(
            table.replicated(
                "decoder.final_layernorm.weight", names.final_norm, (spec.hidden_size,)
            )
        )
        if head == "value":
            params.append(table.replicated(VALUE_HEAD, names.value_head, (1, spec.hidden_size)))
        # On a single stage the tied head is the embedding parameter itself.
        if head == "lm" and not (spec.tie_embeddings and first):
            tied = spec.tie_embeddings
            source = names.embedding if tied else names.lm_head
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
    def tp(self) -> int:
        return self.layout.tp

    def layer(self, prefix: str, layer: int, style: SpecStyle) -> list[LocalParam]:
        """One decoder layer: `prefix` is its local name, `layer` its global number."""
        spec, names = self.spec, self.names
        hidden = (spec.hidden_size,)
        qkv_norm, mlp_norm = _NORM_NAMES[style]
        if spec.num_experts:
            mlp_norm = "pre_mlp_layernorm.weight"  # the router reads it too, so nothing fuses it

        def hf(template: str) -> str:
            return template.format(layer=layer)

        params = [
            self.replicated(prefix + qkv_norm, hf(names.input_norm), hidden),
            self.columns(
                prefix + "self_attention.linear_proj.weight",
                hf(names.attention_output),
                spec.num_heads * spec.head_dim,
            ),
            self.qkv(prefix + "self_attention.linear_qkv.weight", layer, bias=False),
        ]
        if spec.qkv_bias:
            params.append(self.qkv(prefix + "self_attention.linear_qkv.bias", layer, bias=True))
        if spec.qk_norm:
            assert names.query_norm and names.key_norm
            head = (spec.head_dim,)
            params.append(
                self.replicated(
                    prefix + "self_attention.q_layernorm.weight", hf(names.query_norm), head
                )
            )
            params.append(
                self.replicated(
                    prefix + "self_attention.k_layernorm.weight", hf(names.key_norm), head
                )
            )
        params.append(self.replicated(prefix + mlp_norm, hf(names.post_attention_norm), hidden))
        if spec.num_experts:
            params += self.experts(prefix + "mlp.", layer, style)
        else:
            params.append(
                self.rows(
                    prefix + "mlp.linear_fc1.weight", [hf(names.gate), hf(names.up)], spec.ffn_size
                )
            )
            params.append(
                self.columns(prefix + "mlp.linear_fc2.weight", hf(names.down), spec.ffn_size)
            )
        return params

    def replicated(self, name: str, hf_name: str, shape: tuple[int, ...]) -> LocalParam:
        """The whole tensor on every tensor-parallel rank."""
        box = full_box(shape)
        return LocalParam(
            name,
            shape,
            (Piece(hf_name, box, box),),
            self.coords.first_replica and self.coords.tp == 0,
        )

    def experts(self, prefix: str, layer: int, style: SpecStyle) -> Iterator[LocalParam]:
        """The router, and each expert of this rank: gate and up stacked, and down."""
        spec, names = self.spec, self.names
        assert names.router
        router = (spec.num_experts, spec.hidden_size)
        yield self.replicated(prefix + "router.weight", names.router.format(layer=layer), router)
        share = spec.num_experts // self.layout.ep
        primary = self.layout.expert_replica(self.coords) == 0
        ffn, hidden = spec.moe_ffn_size, spec.hidden_size
        fc1_box, fc2_box = full_box((ffn, hidden)), full_box((hidden, ffn))
        for local in range(share):
            at = {"layer": layer, "expert": self.coords.ep * share + local}
            gate, up, down = (
                template.format(**at) for template in (names.gate, names.up, names.down)
            )
            pieces = (
                Piece(gate, fc1_box, fc1_box),
                Piece(up, fc1_box, ((ffn, 2 * ffn), (0, hidden))),
            )
            fc1, fc2 = (
                prefix + _EXPERT_NAMES[style].format(expert=local, linear=n) for n in (1, 2)
            )
            yield LocalParam(fc1, (2 * ffn, hidden), pieces, primary, expert=True)
            yield LocalParam(
                fc2, (hidden, ffn), (Piece(down, fc2_box, fc2_box),), primary, expert=True
            )

    def vocabulary(self, name: str, hf_name: str, exported: bool = True) -> LocalParam:
        """This rank's share of the rows of a [vocabulary, hidden] tensor.

        Its last rows may be padding.
        """
        share, columns = (
            padded_vocab_size(self.spec, self.layout) // self.tp,
            (0, self.spec.hidden_size),
        )
        start = self.coords.tp * share
        real = min(share, self.spec.vocab_size - start)
        pieces = (
            (Piece(hf_name, ((start, start + real), columns), ((0, real), columns)),)
            if real > 0
            else ()
        )
        shape = (share, self.spec.hidden_size)
        return LocalParam(name, shape, pieces, exported and self.coords.first_replica, tp_dim=0)

    def rows(self, name: str, hf_names: list[str], size: int) -> LocalParam:
        """This rank's share of the rows of each of `hf_names` ([size, hidden] each), stacked."""
        share, columns = size // self.tp, (0, self.spec.hidden_size)
        start = self.coords.tp * share
        pieces = tuple(
            Piece(
                hf_name, ((start, start + share), columns), ((i * share, (i + 1) * share), columns)
            )
            for i, hf_name in enumerate(hf_names)
        )
        shape = (len(hf_names) * share, self.spec.hidden_size)
        return LocalParam(name, shape, pieces, self.coords.first_replica, tp_dim=0)

    def columns(self, name: str, hf_name: str, size: int) -> LocalParam:
        """This rank's share of the columns of a [hidden, size] tensor."""
        share, rows = size // self.tp, (0, self.spec.hidden_size)
        start = self.coords.tp * share
        piece = Piece(hf_name, (rows, (start, start + share)), (rows, (0, share)))
        return LocalParam(
            name, (self.spec.hidden_size, share), (piece,), self.coords.first_replica, tp_dim=1
        )

    def qkv(self, name: str, layer: int, bias: bool) -> LocalParam:
        """Fused attention input: for each KV group of this rank its query heads, key head and value
        head.
        """
        spec, names = self.spec, self.names
        groups = spec.num_kv_heads // self.tp
        query_rows = spec.num_heads // spec.num_kv_heads * spec.head_dim
        rest: Box = () if bias else ((0, spec.hidden_size),)
        parts = (
            (names.query, query_rows),
            (names.key, spec.head_dim),
            (names.value, spec.head_dim),
        )
        pieces, row = [], 0
        for group in range(self.coords.tp * groups, (self.coords.tp + 1) * groups):
            for template, rows in parts:
                hf_name = (bias_name(template) if bias else template).format(layer=layer)
                hf_rows, local_rows = (group * rows, (group + 1) * rows), (row, row + rows)
                pieces.append(Piece(hf_name, (hf_rows, *rest), (local_rows, *rest)))
                row += rows
        shape = (row,) if bias else (row, spec.hidden_size)
        return LocalParam(name, shape, tuple(pieces), self.coords.first_replica, tp_dim=0)


_NORM_NAMES: dict[SpecStyle, tuple[str, str]] = {
    "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
}
_EXPERT_NAMES: dict[SpecStyle, str] = {
    "local": "experts.local_experts.{expert}.linear_fc{linear}.weight",
    "te": "experts.linear_fc{linear}.weight{expert}",
}
