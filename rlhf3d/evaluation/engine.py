"""The vLLM engine of an evaluation, which serves a model folder's own weights.

Invariant: vLLM is imported when the engine is made, and so not for an evaluation that has nothing left to generate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf3d.evaluation.run import Engine


@dataclass(frozen=True)
class EngineOptions:
    """How to run it here; no results depend on it beyond the dtype's rounding."""

    dtype: str = "auto"
    max_num_seqs: int = 64
    threads: int | None = None
    """CPU threads; null for all cores."""
    kv_cache_gib: float = 1.0
    """On CPU."""
    gpu_memory_utilization: float = 0.9
    """On a GPU."""


def engine_maker(model: Path, max_model_len: int, seed: int, options: EngineOptions) -> Callable[[], Engine]:
    """A function that starts the engine."""
    if options.dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype {options.dtype}: must be auto, bfloat16 or float32")

    def make() -> Engine:
        from rlhf3d.parallel.platform import choose_platform
        from rlhf3d.rollout.vllm_engine import VLLMEngine

        platform = choose_platform("auto")
        return VLLMEngine(
            model.resolve(),
            dtype=platform.fast_dtype if options.dtype == "auto" else options.dtype,
            max_model_len=max_model_len,
            max_num_seqs=options.max_num_seqs,
            kv_cache_gib=options.kv_cache_gib,
            threads=options.threads or os.cpu_count() or 1,
            seed=seed,
            platform_kind=platform.kind,
            gpu_memory_utilization=options.gpu_memory_utilization,
            load_weights=True,
        )

    return make
