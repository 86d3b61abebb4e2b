"""Patch `moe_router_gemm`: the router of a mixture of experts runs without Transformer Engine.

Invariant: `te_general_gemm` is None where there is none, which upstream's router takes as "use
torch". From 0.17 on upstream sees to it.
"""

from __future__ import annotations

from megatron_patches.patch import Patch, Target

_MODULE = "megatron.core.transformer.moe.moe_utils"


def _lacks_name() -> bool:
    from megatron.core.transformer.moe import moe_utils

    return not hasattr(moe_utils, "te_general_gemm")


def _apply() -> None:
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


PATCH = Patch(
    name="moe_router_gemm",
    versions=">=0.16,<0.17",
    reason="without Transformer Engine the router raises NameError: te_general_gemm",
    targets=(
        Target(f"{_MODULE}:RouterGatingLinearFunction.forward", "if te_general_gemm is not None"),
    ),
    apply=_apply,
    cpu_only=False,
    needed=_lacks_name,
)
