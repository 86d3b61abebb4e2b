"""vLLM's own kernels of its norms on CPU, where it would run several operations of torch for each.

Invariant: what a kernel returns differs from what it replaces by rounding only, and is no farther
from exact. Measured in turns with vLLM's own way, a decode step of a model of 135M parameters with
32 requests in bfloat16 takes 0.79 to 0.85 of its time.
Runs in: engine rank, or the process of `rlhf3d evaluate`.
"""

from __future__ import annotations

from typing import Any

import torch

PROVIDER = "rlhf3d"
"""Of the norms, in vLLM's list of implementations."""
VECTOR = 8
"""The kernels take widths that are a multiple of it."""


def cpu_kernels() -> dict[str, Any]:
    """Have vLLM know them, once a process; the arguments with which `vllm.LLM` takes them.

    Ranks of log-probs are left out as well.
    """
    from vllm import ir

    if PROVIDER not in ir.ops.rms_norm.impls:
        _leave_out_ranks()
        _register_norms()
    return {
        "kernel_config": {
            "ir_op_priority": {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
        }
    }


def _register_norms() -> None:
    from vllm import ir

    def takes(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        if weight is None or variance_size is not None:
            return False
        alike = weight.dtype == x.dtype and weight.shape == x.shape[-1:]
        return alike and weight.is_contiguous() and x.shape[-1] % VECTOR == 0

    def takes_both(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        # It writes to both, so that copies would not do.
        whole = x.is_contiguous() and x_residual.is_contiguous()
        return whole and x_residual.dtype == x.dtype and takes(x, weight, epsilon, variance_size)

    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=takes)
    def rms_norm(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> torch.Tensor:
        x = x.contiguous()  # norms of queries and keys get views of what one product made
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=takes_both, inplace=True)
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def _leave_out_ranks() -> None:
    """Leave out the rank of each token's log-prob among all, which nobody reads.

    It compares all logits, and adds up the results as 64-bit numbers.
    """
    from vllm.v1.sample import sampler

    assert hasattr(sampler, "batched_count_greater_than"), (
        "vLLM no longer takes ranks of log-probs by batched_count_greater_than"
    )

    def no_ranks(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], dtype=torch.int64)

    sampler.batched_count_greater_than = no_ranks
