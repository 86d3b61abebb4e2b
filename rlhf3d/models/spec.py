"""The shape of a model, read from a Hugging Face folder and checked against a layout.

Invariant: a `ModelSpec` describes only what the trainer computes exactly; a folder that asks for
anything else is refused here, with the key, the value and the fix. Pure: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Literal

from rlhf3d.models import llama, mixtral, qwen2, qwen3, qwen3_moe
from rlhf3d.models.family import ExpertKeys, Family
from rlhf3d.models.folder import weight_files
from rlhf3d.models.hf_config import (
    Fields,
    RopeScaling,
    YarnRopeScaling,
    read_rope,
    refuse_layers_of_other_kinds,
)
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.paths import read_json
from rlhf3d.units import round_up

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, mixtral, qwen2, qwen3, qwen3_moe)
}


@dataclass(frozen=True)
class ModelSpec:
    """Everything the weight table and the Megatron configuration need to know about a decoder."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    """Experts of every layer; 0 for a dense model."""
    experts_per_token: int = 0
    moe_ffn_size: int = 0
    """Intermediate size of one expert (`ffn_size` is then unused)."""
    norm_topk_prob: bool = False
    """Scale the chosen experts' softmax probabilities to sum to 1."""


def load_spec(folder: Path | str, with_weights: bool = True) -> ModelSpec:
    """Read `config.json`, as written by transformers 4 or 5, of a folder.

    Safetensors must be there unless only the shape is wanted. Raises ValueError that names
    model.path for a folder this trainer cannot load faithfully.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"model.path: no folder {str(folder)!r}; give a local Hugging Face folder "
            f"(for a hub name: `hf download NAME --local-dir FOLDER`)"
        )
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"model.path: {folder} has no config.json; give the folder with config and weights"
        )
    try:
        config = read_json(config_file)
        if with_weights:
            weight_files(folder)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from error
    return parse_config(config, str(folder))


def load_reward_spec(folder: Path | str) -> ModelSpec:
    """`load_spec` of a sequence classifier with one output.

    Its ValueErrors name reward_model.path.
    """
    from rlhf3d.models.hf_io import HFReader, check_weights  # loads torch

    try:
        # Its messages name model.path; they are renamed below.
        spec = load_spec(folder)
        with HFReader(folder) as reader:
            head, names = FAMILIES[spec.family].names.value_head, reader.names()
            shape = reader.shape(head) if head in names else None
        if shape == (1, spec.hidden_size):
            check_weights(folder, spec, "value")
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "reward_model.path", 1)) from error
    if shape != (1, spec.hidden_size):
        found = "has no" if shape is None else f"has {list(shape)} as"
        raise ValueError(
            f"reward_model.path: {folder} {found} {head} [1, {spec.hidden_size}]; give a sequence "
            "classifier with one output (tools/train_reward_model.py makes one from a language "
            "model and preferences)"
        )
    return spec


def parse_config(config: dict[str, Any], source: str) -> ModelSpec:
    """`config.json` -> ModelSpec; `source` is the folder named in errors."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ValueError(
            f"model.path: {source} has model_type {model_type!r}; supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    for key, wanted in {**_REQUIRED, **family.required}.items():
        given = config.get(key)
        if given is not None and (
            # In Python 0 == False and 1 == True.
            given != wanted or isinstance(wanted, bool) != isinstance(given, bool)
        ):
            raise ValueError(
                f"model.path: {source} has {key}={config[key]!r}; {model_type} is supported with "
                f"{key}={wanted!r} only: choose a model published so"
            )
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise ValueError(
                f"model.path: {source} is quantized ({key}); give the original weights"
            )
    # null in config.json replaces a default here, as it does in transformers.
    fields = Fields({**family.defaults, **config}, source)
    layers = fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    refuse_layers_of_other_kinds(fields, layers)
    theta, scaling = read_rope(fields, family.default_rope_theta)
    window = fields.integer("max_position_embeddings")
    if isinstance(scaling, YarnRopeScaling):
        # `max_position_embeddings` may still be that of the window before it was stretched.
        window = scaling.window
    experts = _parse_experts(fields, family.experts) if family.experts else {}
    return ModelSpec(
        family=family.model_type,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, family, heads),
        head_dim=_head_dim(fields, family, hidden, heads),
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=window,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        **experts,
    )


_REQUIRED: dict[str, object] = {
    "transformers_weights": None,
    "is_causal": True,
    "logit_scale": 1.0,
    "dual_chunk_attention_config": None,
}
"""What transformers or vLLM heeds in any family, and the other or Megatron does not."""


def _kv_heads(fields: Fields, family: Family, heads: int) -> int:
    # Dense models without the key have as many as query heads; mixtures of experts must name it.
    if family.experts is None and not fields.given("num_key_value_heads"):
        return heads
    kv_heads = fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"model.path: {fields.source} has num_attention_heads={heads} and "
            f"num_key_value_heads={kv_heads}: each key-value head serves as many query heads, but "
            f"{heads} % {kv_heads} = {heads % kv_heads}"
        )
    return kv_heads


def _head_dim(fields: Fields, family: Family, hidden: int, heads: int) -> int:
    head_dim = None
    if "head_dim" in family.defaults or fields.given("head_dim"):
        head_dim = fields.integer("head_dim")
    # Some classes of transformers refuse this even where head_dim is given.
    if hidden % heads and (head_dim is None or family.heads_divide_hidden):
        raise ValueError(
            f"model.path: {fields.source} has hidden_size={hidden} and "
            f"num_attention_heads={heads}: {hidden} % {heads} = {hidden % heads}"
        )
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        raise ValueError(
            f"model.path: {fields.source} has heads of {head_dim}, which rotary positions cannot "
            "halve"
        )
    return head_dim


def _parse_experts(fields: Fields, keys: ExpertKeys) -> dict[str, Any]:
    # The key has had two names; without either, the first is reported as missing.
    given = [key for key in keys.num_experts if fields.given(key)] or [keys.num_experts[0]]
    counts = [fields.integer(key) for key in given]
    if len(set(counts)) > 1:
        raise fields.wrong(keys.num_experts[0], f"{counts[1]}, as {keys.num_experts[1]}")
    chosen = fields.integer(keys.experts_per_token)
    normalized = keys.norm_topk_prob is None or fields.flag(keys.norm_topk_prob, False)
    if chosen > counts[0]:
        raise ValueError(
            f"model.path: {fields.source} has {keys.experts_per_token}={chosen} of {counts[0]} "
            f"experts; it must be 1 to {counts[0]}: download config.json again"
        )
    if chosen == 1 and normalized:
        raise ValueError(
            f"model.path: {fields.source} has {keys.experts_per_token}=1 with probabilities scaled "
            "to sum to 1: the router then has no effect on them and cannot be trained; choose a "
            "model with two or more experts a token"
        )
    return {
        "num_experts": counts[0],
        "experts_per_token": chosen,
        "moe_ffn_size": fields.integer(keys.ffn_size),
        "norm_topk_prob": normalized,
    }


def architecture(model_type: str, head: Literal["CausalLM", "SequenceClassification"]) -> str:
    """The name of transformers' (and vLLM's) class of a model."""
    return f"{''.join(part.capitalize() for part in model_type.split('_'))}For{head}"


def padded_vocab_size(spec: ModelSpec, layout: ParallelLayout) -> int:
    """Rows of Megatron's embedding and vocabulary head: a multiple of tp."""
    return round_up(spec.vocab_size, layout.tp)


def check_layout(spec: ModelSpec, layout: ParallelLayout, sequence_parallel: bool = True) -> None:
    """Raise ValueError where `layout` does not divide a size of `spec`, with the nearest legal."""
    problems = (
        _tensor_problems(spec, layout)
        + _pipeline_problems(spec, layout)
        + _expert_problems(spec, layout)
    )
    if spec.num_experts and layout.tp > 1 and not sequence_parallel:
        problems.append(
            (
                f"tp {layout.tp} without sequence_parallel: every tensor rank would send all "
                "tokens to the experts",
                "sequence_parallel true, or tp 1",
            )
        )
    if problems:
        wrong, fixes = zip(*problems, strict=True)
        raise ValueError(
            f"layout: {layout} does not fit this model: {'; '.join(wrong)}. "
            f"Nearest legal: {'; '.join(dict.fromkeys(fixes))}"
        )


Problem = tuple[str, str]
"""What is wrong, with the arithmetic, and the nearest legal choice."""


def _tensor_problems(spec: ModelSpec, layout: ParallelLayout) -> list[Problem]:
    sizes = {"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads}
    if not spec.num_experts:  # an expert is whole on its rank
        sizes["intermediate_size"] = spec.ffn_size
    # A legal tp divides all of them, so it divides their greatest common divisor.
    fix = _nearest("tp", gcd(*sizes.values()), layout.tp)
    return [
        (f"{name} {size} % tp {layout.tp} = {size % layout.tp}", fix)
        for name, size in sizes.items()
        if size % layout.tp
    ]


def _pipeline_problems(spec: ModelSpec, layout: ParallelLayout) -> list[Problem]:
    problems = []
    stages = layout.pp * layout.vpp
    if layout.first_stage_layers is not None or layout.last_stage_layers is not None:
        if layout.stage_layers(spec.num_layers) is None:
            problems.append(_uneven_problem(spec, layout))
    elif spec.num_layers % stages:
        product = f"pp {layout.pp}" if layout.vpp == 1 else f"(pp {layout.pp} x vpp {layout.vpp})"
        problems.append(
            (
                f"num_hidden_layers {spec.num_layers} % {product} = {spec.num_layers % stages}",
                _nearest("pp" if layout.vpp == 1 else "pp x vpp", spec.num_layers, stages),
            )
        )
    if layout.vpp > 1 and layout.pp == 1:
        problems.append(
            (
                f"vpp {layout.vpp} with pp 1: virtual stages interleave over pipeline ranks",
                "vpp null, or pp 2 or more",
            )
        )
    return problems


def _uneven_problem(spec: ModelSpec, layout: ParallelLayout) -> Problem:
    first, last = layout.first_stage_layers, layout.last_stage_layers
    others = layout.pp - (first is not None) - (last is not None)
    given = " - ".join(
        f"{name} {n}" for name, n in (("first", first), ("last", last)) if n is not None
    )
    left = spec.num_layers - (first or 0) - (last or 0)
    whole = "" if layout.vpp == 1 else f", each stage a multiple of vpp {layout.vpp}"
    return (
        f"num_hidden_layers {spec.num_layers} - {given} = {left} layers for the other {others} of "
        f"pp {layout.pp}",
        "first_stage_layers and last_stage_layers that leave all other stages the same number of "
        f"layers, 1 or more{whole}",
    )


def _expert_problems(spec: ModelSpec, layout: ParallelLayout) -> list[Problem]:
    # Groups of ep are made of the ranks of one pipeline stage.
    ep, ranks = layout.ep, layout.stage_size
    if ep > 1 and not spec.num_experts:
        return [(f"ep {ep}, but the model is dense: it has no experts to share out", "ep 1")]
    sizes = {
        f"num_experts {spec.num_experts}": spec.num_experts,
        f"(tp {layout.tp} x dp {layout.dp}{f' x cp {layout.cp}' if layout.cp > 1 else ''})": ranks,
    }
    fix = _nearest("ep", gcd(*sizes.values()), ep)
    return [(f"{label} % ep {ep} = {size % ep}", fix) for label, size in sizes.items() if size % ep]


def _nearest(name: str, total: int, value: int) -> str:
    """The divisors of `total` next below and next above `value`."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return f"{name} {' or '.join(str(d) for d in below + above)}"
