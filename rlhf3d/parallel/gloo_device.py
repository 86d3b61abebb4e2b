"""One device of gloo, with its thread, for all process groups of a training rank.

Invariant: what groups send, and to whom, stays the same. By itself torch gives each group a device
of its own, whose thread looks for messages 100 times a second, also while an engine generates; a
single rank has 21 groups.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache, wraps
from typing import Any

from torch.distributed import ProcessGroupGloo as Gloo
from torch.distributed import Store

THREADS_A_DEVICE = 2
"""That run a group's operations, as torch has it; they sleep where there are none."""
_SHARES = "__rlhf3d_shares__"


def share_device() -> None:
    """Have groups that this process makes from now on share a device; once more does nothing."""
    own = Gloo.__init__
    if hasattr(own, _SHARES):
        return

    @wraps(own)
    def build(self: Gloo, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = Gloo._Options()
        options._devices = _shared_devices()
        options._threads = THREADS_A_DEVICE * len(options._devices)
        options._timeout = timeout
        own(self, store, rank, size, options)

    setattr(build, _SHARES, True)
    Gloo.__init__ = build


@cache
def _shared_devices() -> list[Any]:
    """One for each interface that the user names, as torch reads them."""
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [Gloo.create_device(interface=name) for name in names.split(",")]
    return [Gloo.create_default_device()]
