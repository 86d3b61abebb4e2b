"""The explanation of a plan: figures, routes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.resharding.explain import explain, explain_view
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.resharding.sites import Sites

SPEC = ModelSpec(
    "llama", 4, 32, num_heads=4, num_kv_heads=4, head_dim=8, ffn_size=64, vocab_size=128
)
SETUP = SyncSetup(
    "test",
    SPEC,
    ParallelLayout(tp=4),
    "local",
    Sites.gpus(4, 4),
    "bfloat16",
    1 << 20,
    1.0,
    engines=2,
    tensor_parallel_size=2,
)


def test_figures_add_up() -> None:
    facts = explain(SETUP)
    # Embedding and head 128 x 32 each; a layer: 4 x 32 x 32 attention, 3 x 64 x 32 MLP, 2 norms;
    # the final norm.
    assert facts.model_bytes == 2 * (2 * 128 * 32 + 4 * (4 * 32 * 32 + 3 * 64 * 32 + 2 * 32) + 32)
    assert facts.formula_bytes == facts.model_bytes * (4 - 2) // (4 * 2)
    for rank in facts.ranks:
        assert rank.received == rank.bound == rank.needed - rank.local > 0
        assert rank.full_gather == facts.model_bytes * 3 // 4 > rank.received
    assert sum(facts.sent) == sum(rank.received for rank in facts.ranks)


def test_experts_are_shared_out_over_expert_ranks() -> None:
    """Each rank has half of the experts, whole, and all else cut over tp."""
    experts = replace(SPEC, family="qwen3_moe", num_experts=4, experts_per_token=2, moe_ffn_size=16)
    experts = replace(experts, qk_norm=True)
    layout = ParallelLayout(tp=2, dp=2, ep=2)
    facts = explain(replace(SETUP, spec=experts, layout=layout))
    of_experts = 2 * 4 * 4 * 3 * 32 * 16
    assert facts.formula_bytes is None
    for rank in facts.ranks:
        dense = facts.model_bytes - of_experts
        assert rank.full_gather == facts.model_bytes - dense // 2 - of_experts // 2
    alone = explain(replace(SETUP, spec=experts, layout=ParallelLayout(tp=4)))
    # Every rank has all experts.
    assert alone.ranks[0].full_gather == (alone.model_bytes - of_experts) * 3 // 4


def test_routes_of_a_tensor_are_shown() -> None:
    view = explain_view(SETUP, "tiny", "*layers.3.self_attn.k_proj.weight")
    console = Console(width=200, record=True)
    console.print(*view.parts)
    text = console.export_text()
    assert (
        "model.layers.3.self_attn.qkv_proj.weight" in text
        and "decoder.layers.3.self_attention.linear_qkv" in text
    )
    routes = view.data["routes"]
    assert isinstance(routes, list) and len(routes) == 8  # four KV heads to each of two engines


def test_unknown_tensor_and_too_many_engines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--tensor 'nothing' matches no tensor"):
        explain_view(SETUP, "tiny", "nothing")
    with pytest.raises(ValueError, match=r"rollout\.engines = 3"):
        explain(replace(SETUP, engines=3))
