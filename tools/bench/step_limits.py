"""What the tokens of a step cost at least, at rates that were measured.

Invariant: counted is what has to be done, not what anyone does: a prompt's tokens once for all of
its completions, the vocabulary head at response tokens only, no padding, nothing twice. So one
limit stands beside every side that is measured. Pure: numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import hf_tensors
from rlhf3d.planning.engines import kv_bytes_a_token
from rlhf3d.planning.search.flops import decoder_weights_read, head_flops, layer_flops
from rlhf3d.planning.search.times import ADAM_BYTES, BACKWARD
from rlhf3d.units import ITEM_BYTES


@dataclass(frozen=True)
class Rates:
    """What the machine reaches."""

    forward_flops: float
    """Operations a second in the products of a forward pass."""
    backward_flops: float
    """And of a backward pass."""
    copied_bytes: float
    """Bytes a second of a copy, read and written."""


@dataclass(frozen=True)
class Rows:
    """Lengths of a batch: its mean prompt and response, tokens."""

    prompts: int
    completions: int
    """Of each prompt."""
    prompt: float
    response: float
    longest: float
    """Tokens of the longest response."""

    @property
    def tokens(self) -> float:
        """Of all rows, each with its prompt: what a trainer without sharing has to compute."""
        return self.prompts * self.completions * (self.prompt + self.response)

    @property
    def responses(self) -> float:
        """Response tokens of all rows."""
        return self.prompts * self.completions * self.response

    @property
    def context(self) -> float:
        """Tokens that a response token attends to on average."""
        return self.prompt + self.response / 2


def parameters(spec: ModelSpec) -> int:
    """Weights of the model."""
    return sum(math.prod(shape) for shape in hf_tensors(spec, "lm").values())


def prompt_flops(spec: ModelSpec, rows: Rows) -> float:
    """Layers over each prompt once; causal, so that a token attends to half of it on average."""
    return spec.num_layers * layer_flops(spec, rows.prompts * rows.prompt, rows.prompt / 2)


def response_flops(spec: ModelSpec, rows: Rows) -> float:
    """Layers and head over all response tokens."""
    layers = spec.num_layers * layer_flops(spec, rows.responses, rows.context)
    return layers + head_flops(spec, rows.responses)


def forward_s(spec: ModelSpec, rows: Rows, rates: Rates) -> float:
    """Log-probs of the responses."""
    return (prompt_flops(spec, rows) + response_flops(spec, rows)) / rates.forward_flops


def backward_s(spec: ModelSpec, rows: Rows, rates: Rates) -> float:
    """Gradients of all weights."""
    flops = BACKWARD * (prompt_flops(spec, rows) + response_flops(spec, rows))
    return flops / rates.backward_flops


def optimizer_s(spec: ModelSpec, rates: Rates) -> float:
    """One pass of Adam over weights, gradients and moments."""
    return ADAM_BYTES["te"] * parameters(spec) / rates.copied_bytes


def update_s(spec: ModelSpec, rows: Rows, rates: Rates) -> float:
    """One optimizer step over the rows."""
    passes = forward_s(spec, rows, rates) + backward_s(spec, rows, rates)
    return passes + optimizer_s(spec, rates)


def generate_s(spec: ModelSpec, rows: Rows, rates: Rates, dtype: str) -> float:
    """Prompts once, then a decoding step a token of the longest completion.

    Decoding takes what is longer of its products, and of reading weights and cache.
    """
    prefill = prompt_flops(spec, rows) + head_flops(spec, rows.prompts)
    at_once = rows.responses / rows.longest
    weights = rows.longest * decoder_weights_read(spec, at_once) * ITEM_BYTES[dtype]
    cache = rows.responses * rows.context * kv_bytes_a_token(spec, 1, dtype)
    decoding = max(
        response_flops(spec, rows) / rates.forward_flops, (weights + cache) / rates.copied_bytes
    )
    return prefill / rates.forward_flops + decoding


def copy_s(spec: ModelSpec, rates: Rates, dtype: str) -> float:
    """All weights copied once."""
    return 2 * parameters(spec) * ITEM_BYTES[dtype] / rates.copied_bytes


def step_limits(
    spec: ModelSpec, rows: Rows, rates: Rates, dtype: str, sync_s: float | None
) -> dict[str, float]:
    """Seconds of each phase of a GRPO step with a reference model and one optimizer step.

    `sync_s`: a measured limit of the sync. The old log-probs cost nothing: they are those of the
    update's own forward pass.
    """
    return {
        "sync_weights": copy_s(spec, rates, dtype) if sync_s is None else sync_s,
        "generate": generate_s(spec, rows, rates, dtype),
        "old_logprobs": 0.0,
        "ref_logprobs": forward_s(spec, rows, rates),
        "update_actor": update_s(spec, rows, rates),
    }
