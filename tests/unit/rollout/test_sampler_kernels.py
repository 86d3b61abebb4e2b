"""The sampler's kernels of vLLM on GPUs, in Triton's interpreter, against what the trainer
computes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rlhf3d.engine.logprobs import vocab_parallel_logprobs
from rlhf3d.parallel.platform import CPUPlatform

TEMPERATURES = [1.0, 0.7, 1.3, 1.0, 0.2, 2.0]


def interpreted(module: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A module of vLLM's GPU sampler, its kernels made anew for the interpreter."""
    import triton
    import triton.language as tl
    from vllm import triton_utils

    patch.setattr(triton_utils, "triton", triton)
    patch.setattr(triton_utils, "tl", tl)
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "v1" / "worker" / "gpu" / "sample" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"interpreted_{module}", file)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def engine_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """In vLLM's process: processed log-probs of sampled tokens, each row a request with a
    temperature of its own.
    """
    logits = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        gumbel, logprob = interpreted("gumbel", patch), interpreted("logprob", patch)
        rows = torch.arange(len(logits), dtype=torch.int32)
        gumbel.apply_temperature(logits, rows, torch.tensor(TEMPERATURES))
        found: torch.Tensor = logprob.compute_token_logprobs(logits, tokens[:, None])
    return found[:, 0]


def test_sampled_log_probs_are_the_trainers_at_each_temperature(
    in_vllm_process: Callable[..., Any],
) -> None:
    torch.manual_seed(0)
    # More columns than the kernels take at once, and not a multiple of it.
    hidden, weight = 4 * torch.randn(len(TEMPERATURES), 8), torch.randn(9001, 8)
    tokens = torch.randint(0, 9001, (len(TEMPERATURES),))
    sampled = in_vllm_process(engine_logprobs, hidden @ weight.t(), tokens)
    trained = [
        vocab_parallel_logprobs(
            hidden[row, None],
            weight,
            tokens[row, None],
            temperature=temperature,
            platform=CPUPlatform("test"),
        )[0]
        for row, temperature in enumerate(TEMPERATURES)
    ]
    torch.testing.assert_close(sampled, torch.cat(trained), atol=2e-5, rtol=1e-6)
    assert not torch.allclose(
        sampled[1], (hidden @ weight.t()).log_softmax(-1)[1, tokens[1]], atol=1e-2
    )
