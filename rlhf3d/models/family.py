"""What one architecture family declares: the config values it needs and the names of its weights.

Invariant: a family is data only; everything computed from it lives in `spec.py` and `weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class WeightNames:
    """Hugging Face tensor names, `{layer}` for the layer number.

    Matrices are [out features, in features]. In a mixture of experts `gate`, `up` and `down` are
    those of expert `{expert}`.
    """

    embedding: str
    final_norm: str
    lm_head: str
    value_head: str
    input_norm: str
    post_attention_norm: str
    query: str
    key: str
    value: str
    attention_output: str
    gate: str
    up: str
    down: str
    query_norm: str | None = None
    key_norm: str | None = None
    router: str | None = None


@dataclass(frozen=True)
class ExpertKeys:
    """Keys in config.json of a mixture of experts.

    The router is a softmax, every layer is sparse, and there is no shared expert.
    """

    num_experts: tuple[str, ...]
    """Alternative keys: generations of transformers name it differently."""
    experts_per_token: str
    ffn_size: str
    norm_topk_prob: str | None
    """Whether the chosen experts' probabilities are scaled to sum to 1.

    None where they always are.
    """


@dataclass(frozen=True)
class Family:
    """One `model_type` of a decoder.

    RMSNorm before attention and MLP, rotary positions, SwiGLU, grouped-query attention.
    """

    model_type: str
    names: WeightNames
    required: Mapping[str, object]
    """config.json keys that, where given, must have this value: anything else is another
    architecture.
    """
    qkv_bias: bool = False
    """Biases on the query, key and value projections (the output projection has none)."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key."""
    experts: ExpertKeys | None = None
    """Where config.json describes the experts; None for a dense model."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes for keys that config.json does not have, where that is not derived
    from others.
    """
    heads_divide_hidden: bool = False
    """Whether transformers wants hidden_size to be a multiple of the heads even where head_dim is
    given.
    """
    default_rope_theta: float = 10000.0
    """Base of the rotary positions where config.json gives none."""
