"""Weights by the table, without a model.

Small specs, numbered tensors cut for any layout, plans carried out by copies.

Invariant: every element of a made tensor is a different number, so that a block in the wrong place
shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from rlhf3d.models.boxes import box_slices
from rlhf3d.models.spec import FAMILIES, ModelSpec, load_spec
from rlhf3d.models.weights import Head, LocalParam, hf_tensors, local_params
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.resharding.plan import ReshardPlan, TransferOp

Params = dict[tuple[int, str], torch.Tensor]
"""(chunk, name) -> weights of a training rank."""

LLAMA = ModelSpec(
    "llama",
    4,
    8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    ffn_size=24,
    vocab_size=70,
    tie_embeddings=True,
)
QWEN2 = ModelSpec(
    "qwen2",
    2,
    12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    ffn_size=8,
    vocab_size=130,
    qkv_bias=True,
)
QWEN3_MOE = ModelSpec(
    "qwen3_moe",
    2,
    8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_size=1,
    vocab_size=65,
    qk_norm=True,
    num_experts=4,
    experts_per_token=2,
    moe_ffn_size=12,
)


def sparse_weights(folder: Path, head: Head = "lm") -> Path:
    """Write model.safetensors with the tensors of the folder's config.json, in bfloat16.

    A header and a hole.
    """
    header, end = {}, 0
    for name, shape in hf_tensors(load_spec(folder, with_weights=False), head).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def numbered_tensors(spec: ModelSpec, version: int = 0) -> dict[str, torch.Tensor]:
    """Every Hugging Face tensor of the policy in float32, no two elements alike below 2^24."""
    start, tensors = 1 + version, {}
    for name, shape in hf_tensors(spec, "lm").items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    return tensors


def cut(
    tensors: Mapping[str, torch.Tensor], params: Iterable[LocalParam]
) -> dict[str, torch.Tensor]:
    """The parameters that a table describes, padding zero."""
    made = {}
    for param in params:
        made[param.name] = torch.zeros(param.shape)
        for piece in param.pieces:
            made[param.name][box_slices(piece.local_box)] = tensors[piece.hf_name][
                box_slices(piece.hf_box)
            ]
    return made


def rank_params(
    tensors: Mapping[str, torch.Tensor], spec: ModelSpec, layout: ParallelLayout, rank: int
) -> Params:
    """(chunk, name) -> weights of a training rank."""
    at = layout.coords(rank)
    return {
        (chunk, name): weight
        for chunk in range(layout.vpp)
        for name, weight in cut(tensors, local_params(spec, layout, at, chunk)).items()
    }


def carry_out(
    plan: ReshardPlan, dst: int, training: Mapping[int, Params]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[TransferOp]]:
    """A destination's parameters by plain copies along the ops, how often each element was written.

    The ops.
    """
    table = plan.engine_tables[plan.destinations[dst].index]
    made = {param.name: torch.zeros(param.shape) for param in table}
    writes = {param.name: torch.zeros(param.shape, dtype=torch.int) for param in table}
    ops = list(plan.ops_to(dst))
    for op in ops:
        block = training[op.src_rank][op.src_chunk, op.src_param][box_slices(op.src_box)]
        target = made[op.dst_param][box_slices(op.dst_box)]
        target.copy_(block.view(target.shape))
        writes[op.dst_param][box_slices(op.dst_box)] += 1
    return made, writes, ops


class Pair(NamedTuple):
    """A model, a training layout that fits it and an engine layout that fits it."""

    spec: ModelSpec
    layout: ParallelLayout
    engine_tp: int
    expert_parallel: bool


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Small legal combinations of all families.

    Uneven and virtual stages, experts, padded vocabularies, and engines with more and with fewer
    ranks than key-value heads.
    """
    family = draw(st.sampled_from(sorted(FAMILIES)))
    sparse = FAMILIES[family].experts is not None
    tp, pp, dp = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    vpp = draw(st.integers(1, 2)) if pp > 1 else 1
    ep = (
        draw(st.sampled_from([n for n in range(1, tp * dp + 1) if tp * dp % n == 0]))
        if sparse
        else 1
    )
    uneven = (draw(st.booleans()), draw(st.booleans())) if pp > 1 else (False, False)
    first, last = (vpp * draw(st.integers(1, 2)) if given else None for given in uneven)
    engine_tp = draw(st.sampled_from([1, 2, 3, 4, 6]))
    expert_parallel = sparse and draw(st.booleans())
    kv_heads = draw(
        st.sampled_from(
            [n * tp for n in (1, 2, 3) if n * tp % engine_tp == 0 or engine_tp % (n * tp) == 0]
            or [math.lcm(tp, engine_tp)]
        )
    )
    spec = ModelSpec(
        family=family,
        num_layers=vpp * (pp - sum(uneven)) + (first or 0) + (last or 0),
        hidden_size=draw(st.integers(1, 5)),
        num_heads=math.lcm(kv_heads, engine_tp) * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        ffn_size=math.lcm(tp, engine_tp) * draw(st.integers(1, 2)),
        # vLLM pads to 64 rows, and three ranks share out 192.
        vocab_size=draw(st.integers(129, 192) if engine_tp % 3 == 0 else st.integers(1, 80)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_norm=FAMILIES[family].qk_norm,
        num_experts=math.lcm(ep, engine_tp if expert_parallel else 1) if sparse else 0,
        moe_ffn_size=(1 if expert_parallel else engine_tp) * draw(st.integers(1, 2))
        if sparse
        else 0,
    )
    return Pair(spec, ParallelLayout(tp, pp, dp, vpp, ep, first, last), engine_tp, expert_parallel)
