"""Operations of a model's passes, from its shape.

Invariant: a multiplication and an addition are two; counted is what the ranks compute, so the
vocabulary head only at response tokens, and attention only below the diagonal. Pure: numbers only.
"""

from __future__ import annotations

from rlhf3d.models.spec import ModelSpec

COPY_PASSES = 15
"""Reads and writes of hidden states per copy of a token; see `expert_bytes`."""
ACTIVATION_PASSES = 8
"""And of activations between the experts' products."""


def layer_weights(spec: ModelSpec) -> int:
    """Weights of a decoder layer that a token meets."""
    # Queries and the output, keys and values.
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    ffn = spec.moe_ffn_size * spec.experts_per_token if spec.num_experts else spec.ffn_size
    # Gate, up and down; and the router, of a dense model 0.
    return spec.hidden_size * (heads * spec.head_dim + 3 * ffn + spec.num_experts)


def layer_flops(spec: ModelSpec, positions: float, context: float) -> float:
    """Return one layer's forward pass over `positions` tokens.

    Each attends to `context` others on average.
    """
    # Scores and their product with the values: two products of two operations each.
    attention = 4 * spec.num_heads * spec.head_dim * context
    return positions * (2 * layer_weights(spec) + attention)


def attention_products(spec: ModelSpec, tp: int) -> tuple[tuple[float, float], ...]:
    """(inner, columns) of one layer's attention's matrices on a tensor rank.

    Projections in and out.
    """
    q, g = spec.num_heads * spec.head_dim / tp, spec.num_kv_heads * spec.head_dim / tp
    return (spec.hidden_size, q + 2 * g), (q, spec.hidden_size)


def mlp_products(spec: ModelSpec, tp: int) -> tuple[tuple[float, float], ...]:
    """(inner, columns) of one layer's MLP on a tensor rank, or of one expert: gate and up, down."""
    ffn = spec.moe_ffn_size if spec.num_experts else spec.ffn_size / tp
    return (spec.hidden_size, 2 * ffn), (ffn, spec.hidden_size)


def expert_bytes(spec: ModelSpec, item: int) -> float:
    """Memory traffic of a token's way through router and experts in a forward pass, products apart.

    As Megatron's all-to-all dispatcher does it: each copy of the token is gathered (read, written),
    exchanged, sorted by expert, read and written by the experts, sorted back, exchanged and added
    up; between the experts' two products gate and up are read, activated, weighted and written.
    """
    copies = spec.experts_per_token
    return item * copies * (COPY_PASSES * spec.hidden_size + ACTIVATION_PASSES * spec.moe_ffn_size)


def head_flops(spec: ModelSpec, tokens: float) -> float:
    """The vocabulary head's forward pass."""
    return 2 * tokens * spec.hidden_size * spec.vocab_size


def decoder_weights_read(spec: ModelSpec, batch: float) -> float:
    """Weights that a decoding step of `batch` tokens reads.

    Of the experts, those that any token chose.
    """
    attention = spec.hidden_size * (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if spec.num_experts:
        # Share of the experts that any of the tokens chose, if all choices are equally likely.
        chosen = 1 - (1 - spec.experts_per_token / spec.num_experts) ** batch
        mlp = spec.num_experts * chosen * 3 * spec.hidden_size * spec.moe_ffn_size
    else:
        mlp = 3.0 * spec.hidden_size * spec.ffn_size
    # Of the head all rows; the embedding reads one row a token, next to nothing.
    return spec.num_layers * (attention + mlp) + spec.vocab_size * spec.hidden_size
