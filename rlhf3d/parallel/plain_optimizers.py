"""torch's Adam without torch's compiler, all of which an optimizer imports, to switch it off.

Invariant: every number is that of torch's own methods, which are called. Importing the compiler
takes a second of each training rank.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch.optim import Adam, Optimizer

METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
"""Those that torch keeps from being compiled."""
_KEPT = "__dynamo_disable"
"""Where torch looks for what it calls instead."""


def leave_out_compiler() -> None:
    """Have optimizers of this process import no compiler; once more does nothing."""
    for name in METHODS:
        own = _wrapped(getattr(Optimizer, name))
        setattr(own, _KEPT, own)
    if not hasattr(Adam.step, _KEPT):
        Adam.step = _in_no_grad(_wrapped(Adam.step))


def _wrapped(method: Any) -> Any:
    assert hasattr(method, "__wrapped__"), f"torch no longer wraps {method.__qualname__}"
    return method.__wrapped__


def _in_no_grad(step: Any) -> Any:
    """`step` as torch's wrapper calls it, for an optimizer that is not differentiable."""

    @wraps(step)
    def in_no_grad(self: Adam, *arguments: Any, **settings: Any) -> Any:
        assert not self.defaults["differentiable"]
        with torch.no_grad():
            return step(self, *arguments, **settings)

    setattr(in_no_grad, _KEPT, step)
    return in_no_grad
