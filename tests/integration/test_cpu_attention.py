"""The CPU core attention equals upstream's, for each packed sequence alone, and along a tree."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.megatron_cases import SEQUENCE, VOCAB, build_model, forward, join, tokens
from support.ranks import run_ranks

import megatron_patches
from rlhf3d.parallel.layout import ParallelLayout


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    """Megatron imported once, before ranks are forked."""
    megatron_patches.apply("cpu")
    import megatron.core.models.gpt  # noqa: F401


def largest_difference_to_upstream(rank: int, port: int) -> dict[str, float]:
    """Differences of loss and gradients between our attention and DotProductAttention."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    layout = ParallelLayout()
    join(rank, port, layout)
    ours, theirs = build_model(layout), build_model(layout)
    for layer in theirs.decoder.layers:
        attention = layer.self_attention
        attention.core_attention = DotProductAttention(
            theirs.config,
            layer.layer_number,
            AttnMaskType.causal,
            "self",
            pg_collection=attention.pg_collection,
        )
    losses = [forward(model, tokens(0)) for model in (ours, theirs)]
    for loss in losses:
        loss.mean().backward()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return {
        "loss": (losses[0] - losses[1]).abs().max().item(),
        "grad": max((a.grad - b.grad).abs().max().item() for a, b in pairs),
        "signal": max(p.grad.abs().max().item() for p in ours.parameters()),
    }


def packed_and_separate(rank: int, port: int) -> float:
    """Largest difference of logits between three packed sequences and the same ones run alone."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    layout = ParallelLayout()
    join(rank, port, layout)
    model = build_model(layout)
    lengths = [5, 1, 10]
    assert sum(lengths) == SEQUENCE
    ids = torch.randint(0, VOCAB, (1, SEQUENCE), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, 5, 6, 16], dtype=torch.int32)
    packing = PackedSeqParams(
        "thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=10, max_seqlen_kv=10
    )
    with torch.no_grad():
        packed = model(ids, positions, None, packed_seq_params=packing)[0]
        alone = [
            model(part, torch.arange(part.shape[1])[None], None)[0]
            for part in ids.split(lengths, dim=1)
        ]
    return (packed - torch.cat(alone)).abs().max().item()


def refusal(rank: int, port: int) -> str:
    """The message for what is not computed."""
    from megatron.core.transformer.enums import AttnMaskType

    from rlhf3d.parallel.attention import SDPACoreAttention

    layout = ParallelLayout()
    join(rank, port, layout)
    config = build_model(layout).config
    config.attention_dropout = 0.1
    with pytest.raises(ValueError) as raised:
        SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    return str(raised.value)


def test_equals_upstream() -> None:
    (difference,) = run_ranks(1, largest_difference_to_upstream)
    assert difference["signal"] > 1e-2
    assert difference["loss"] < 1e-5 and difference["grad"] < 1e-5


def test_packed_sequences_do_not_see_each_other() -> None:
    assert run_ranks(1, packed_and_separate)[0] < 1e-5


TREE = ((0, 5, 18), (5, 8, 12), (8, 9, 9), (9, 12, 12), (12, 18, 18), (18, 20, 20))
OF_ROWS = ([*range(9)], [*range(8), *range(9, 12)], [*range(5), *range(12, 18)], [18, 19])
"""The columns of each sequence of that tree."""


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_sequences_of_a_tree_get_what_each_would_get_alone(dtype: str, bound: float) -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from rlhf3d.parallel.tree_attention import attend_along_tree

    generator, heads, groups, size = torch.Generator().manual_seed(0), 4, 2, 16

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    inputs = [draw(20, 1, n, size).requires_grad_() for n in (heads, groups, groups)]
    along = attend_along_tree(*inputs, TREE, 0.3)
    alone = []
    for columns in OF_ROWS:
        parts = [x[columns].permute(1, 2, 0, 3) for x in inputs]
        out = scaled_dot_product_attention(*parts, is_causal=True, scale=0.3, enable_gqa=True)
        alone.append(out.permute(2, 0, 1, 3).flatten(2))
    ours = [along[columns] for columns in OF_ROWS]
    weights = [draw(*out.shape) for out in alone]
    gradients = []
    for outs in (ours, alone):
        products = [(out * weight).float().sum() for out, weight in zip(outs, weights, strict=True)]
        gradients.append(torch.autograd.grad(sum(products), inputs))
    for got, expected in zip((*ours, *gradients[0]), (*alone, *gradients[1]), strict=True):
        difference = (got - expected).float().norm() / expected.float().norm()
        assert difference < bound


@pytest.mark.parametrize(
    ("key_tokens", "bound"), [(32, 4e-3), (400, 8e-3)], ids=["in fp32", "one part in bfloat16"]
)
def test_gradients_along_a_tree_are_summed_in_fp32(key_tokens: int, bound: float) -> None:
    """Many short parts see one beginning: rounded after each, its gradients would drift."""
    import torch

    from rlhf3d.parallel.tree_attention import attend_along_tree

    torch.manual_seed(0)
    ends = [key_tokens + 8 * number for number in range(49)]
    # A chain: each of the 48 parts follows the beginning and the parts before it.
    tree = [(0, ends[0], ends[-1]), *((a, b, b) for a, b in pairwise(ends))]
    exact = [torch.randn(ends[-1], 1, n, 16).bfloat16().float() for n in (4, 2, 2)]
    weight = torch.randn(ends[-1], 1, 64).bfloat16()

    def gradients(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend_along_tree(*leaves, tree, 0.3)
        return torch.autograd.grad(out, leaves, weight.to(out.dtype))

    rounded = gradients([x.bfloat16() for x in exact])
    for got, expected in zip(rounded, gradients(exact), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).norm() / expected.norm() < bound


def test_what_is_not_supported_is_refused() -> None:
    assert "attention_dropout=0.1: set it to 0" in run_ranks(1, refusal)[0]
