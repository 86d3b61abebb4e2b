"""vLLM's kernels of norms that an engine on CPU takes, against exact results and its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

EPSILON = 1e-5
DTYPES = [torch.bfloat16, torch.float32]


def computed(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """In vLLM's process: each function by the kernel, by vLLM's own way, and exactly."""
    from vllm import ir
    from vllm.v1.sample import sampler

    from rlhf3d.rollout.vllm_kernels import PROVIDER, cpu_kernels

    arguments = cpu_kernels()
    assert cpu_kernels() == arguments  # a second engine's start changes nothing
    norm, both = ir.ops.rms_norm.impls, ir.ops.fused_add_rms_norm.impls
    exact = [tensor.double() for tensor in (x, residual, weight)]
    total = exact[0] + exact[1]
    kernel_both = both[PROVIDER].impl_fn(x.clone(), residual.clone(), weight, EPSILON)
    own_both = both["native"].impl_fn(x, residual, weight, EPSILON)
    return {
        "norm": (
            norm[PROVIDER].impl_fn(x, weight, EPSILON),
            norm["native"].impl_fn(x, weight, EPSILON),
            _norm(exact[0], exact[2]),
        ),
        "norm of a sum": (kernel_both[0], own_both[0], _norm(total, exact[2])),
        "sum": (kernel_both[1], own_both[1], total),
        "strided": (
            norm[PROVIDER].impl_fn(x[:, :16], weight[:16], EPSILON),
            norm["native"].impl_fn(x[:, :16], weight[:16], EPSILON),
            _norm(exact[0][:, :16], exact[2][:16]),
        ),
        "inputs": (x, residual),
        "taken": _taken(norm[PROVIDER].supports_args, both[PROVIDER].supports_args),
        "ranks": sampler.batched_count_greater_than(x, x[:, :1]).tolist(),
        "arguments": arguments,
    }


def _taken(norm: Callable[..., bool], both: Callable[..., bool]) -> dict[str, bool]:
    """Which arguments the kernels take; both, so that neither may write where it should not."""
    x, weight, columns = torch.randn(4, 32), torch.randn(32), torch.randn(32, 4).t()
    half = x.bfloat16()
    return {
        "whole": norm(x, weight, EPSILON) and both(x, x, weight, EPSILON),
        "strided": norm(columns, weight, EPSILON),
        "no weight": norm(x, None, EPSILON) or both(x, x, None, EPSILON),
        "another dtype": norm(half, weight, EPSILON) or both(half, x, half[0], EPSILON),
        "another width": norm(x[:, :12], weight[:12], EPSILON) or norm(x, weight[:16], EPSILON),
        "strided weight": norm(x[:, :16], weight[::2], EPSILON),
        "a part": norm(x, weight, EPSILON, 16) or both(x, x, weight, EPSILON, 16),
        "strided sum": both(columns, x, weight, EPSILON) or both(x, columns, weight, EPSILON),
    }


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight
    return scaled


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_as_near_to_exact_as_what_they_replace(
    in_vllm_process: Callable[..., Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, residual = (4 * torch.randn(33, 576)).to(dtype), torch.randn(33, 576).to(dtype)
    found = in_vllm_process(computed, x, residual, torch.rand(576).to(dtype))
    for what in ("norm", "norm of a sum", "sum", "strided"):
        kernel, own, exact = found[what]
        assert kernel.dtype == dtype and kernel.shape == own.shape
        error, usual = ((each - exact).norm() / exact.norm() for each in (kernel, own))
        assert error < torch.finfo(dtype).eps and error < 1.3 * usual, what


def test_they_are_taken_where_they_compute_the_same(in_vllm_process: Callable[..., Any]) -> None:
    x = torch.randn(4, 32)
    found = in_vllm_process(computed, x, x + 1, x[0])
    assert {what for what, taken in found["taken"].items() if taken} == {"whole", "strided"}
    assert torch.equal(found["inputs"][0], x) and torch.equal(found["inputs"][1], x + 1)
    assert found["ranks"] == [0, 0, 0, 0]
    taken = found["arguments"]["kernel_config"]["ir_op_priority"]
    assert taken == {"rms_norm": ["rlhf3d"], "fused_add_rms_norm": ["rlhf3d"]}
