"""Where processes meet: a port that its process holds from the moment it names it.

Invariant: nobody else gets a port between `open_meeting` and its use. The socket listens all the
time: first alone, so that an early peer waits in its queue, then as torch's store, which
`torch.distributed` in the same process finds by its port.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

_listening: dict[int, socket.socket] = {}
_serving: list[Any] = []


def open_meeting() -> int:
    """Open a new port of this process, which listens from now on; `host_meeting` serves there."""
    listener = socket.create_server(("", 0), backlog=1024)
    port = int(listener.getsockname()[1])
    _listening[port] = listener
    return port


def host_meeting(port: int, timeout_s: float) -> None:
    """Serve torch's store at a port of `open_meeting` for the life of this process.

    A port of another process is left alone. A `TCPStore(…, is_master=True, multi_tenant=True)` made
    in this process, as torch does for `tcp://`, is this one.
    """
    from torch.distributed import TCPStore

    if listener := _listening.pop(port, None):
        _serving.append(
            TCPStore(
                "127.0.0.1",
                port,
                is_master=True,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
                # The store owns the descriptor from here on: Python must not close it.
                master_listen_fd=listener.detach(),
            )
        )
