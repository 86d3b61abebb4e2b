"""How far engine and trainer may part by rounding alone.

Invariant: one limit a number format, for the canary of a run and for the doctor. Pure.
"""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16", "fp8_per_channel"]
ROUNDING_LIMIT: dict[str, float] = {"float32": 1e-3, "bfloat16": 0.1, "fp8_per_channel": 0.4}
"""Largest mean |log-prob difference| that is rounding, nats, by the coarsest number format
involved; sound pairs are at a third of it or less."""


def coarsest(model_dtype: str, rollout_dtype: str, quantization: str) -> Precision:
    """The format that rounds a difference: one side in bfloat16 is enough."""
    if quantization == "fp8_per_channel":
        return "fp8_per_channel"
    return "float32" if model_dtype == rollout_dtype == "float32" else "bfloat16"
