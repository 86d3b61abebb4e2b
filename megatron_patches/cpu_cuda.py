"""What `torch.cuda` means inside megatron.core on CPU: the module that the device hook binds there.

Invariant: what Megatron needs to train runs on the CPU and does not fail; other names are
`torch.cuda`'s own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

manual_seed = torch.manual_seed


class Event:
    """An event that has always happened: CPU work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    """The one queue of a CPU: all streams are the same and nothing waits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        # All streams are equal, so their hashes have to be.
        return 0


def current_device() -> torch.device:
    return torch.device("cpu")


def current_stream(device: Any = None) -> Stream:
    return Stream()


default_stream = current_stream


def stream(stream: Any) -> nullcontext[None]:
    return nullcontext()


def synchronize(device: Any = None) -> None: ...


def empty_cache() -> None: ...


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def __getattr__(name: str) -> Any:
    return getattr(torch.cuda, name)
