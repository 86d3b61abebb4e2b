"""Patch `lone_replica`: gradients and weights that no other replica shares stay where they are.

Invariant: a reduce-scatter or an all-gather of one rank, whose result is its input, moves nothing.
gloo copies the complete buffer, twice for gradients. Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron_patches.patch import Patch, Target

_MODULE = "megatron.core.distributed.param_and_grad_buffer"
_CLASS = f"{_MODULE}:_ParamAndGradBucketGroup"


def _apply() -> None:
    from megatron.core.distributed import param_and_grad_buffer

    def wrap(collective: Any) -> Any:
        @functools.wraps(collective)
        def wrapped(output: Any, source: Any, *args: Any, group: Any, **kwargs: Any) -> Any:
            # Both are views of one buffer, and the share of a single rank is all of it.
            if group.size() == 1 and output.data_ptr() == source.data_ptr():
                return None
            return collective(output, source, *args, group=group, **kwargs)

        return wrapped

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, wrap(getattr(param_and_grad_buffer, name)))


PATCH = Patch(
    name="lone_replica",
    versions=">=0.16,<0.20",
    reason="without other replicas gloo still copies all gradients twice and all weights once",
    targets=(
        Target(f"{_CLASS}.start_grad_sync", "= dist_reduce_scatter_func("),
        Target(f"{_CLASS}.start_param_sync", "dist_all_gather_func("),
    ),
    apply=_apply,
)
