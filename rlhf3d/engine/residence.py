"""Model states in host memory while other work has the device.

Invariant: a tensor keeps its identity, its views and its bits over `leave` and `enter`; between the two its storage on
the device is empty, and touching it is an error of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PART_BYTES = 1 << 20


class Residents:
    """Storages that come and go together."""

    def __init__(
        self, tensors: Iterable[Tensor], keep: bool = True, without: Iterable[Residents] = ()
    ) -> None:
        """Those of `tensors`, each once, less those of `without`; unless `keep`, they come back as zeros."""
        others = {number for residents in without for number in residents._storages}
        self._storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in others:
                self._storages[storage._cdata] = storage
        self._keep = keep
        self._copies: dict[int, list[Tensor]] = {}
        self._sizes: dict[int, int] = {}
        self.present = True

    def same_as(self, other: Residents) -> bool:
        """Whether both are of the same storages."""
        return self._storages.keys() == other._storages.keys()

    def leave(self) -> None:
        """Free the device's memory."""
        assert self.present, "these states have left already"
        for number, storage in self._storages.items():
            self._sizes[number] = storage.nbytes()
            if self._keep:
                # The copies stay allocated from one leave to the next: pinning memory is slow.
                if number not in self._copies:
                    self._copies[number] = host_memory(
                        storage.nbytes(), storage.device.type != "cpu"
                    )
                content = _bytes(storage)
                for part, host in _parts(content, self._copies[number]):
                    host.copy_(part)
            storage.resize_(0)
        self.present = False

    def enter(self) -> None:
        """Take the device's memory again."""
        assert not self.present, "these states are here already"
        for number, storage in self._storages.items():
            storage.resize_(self._sizes[number])
            content = _bytes(storage)
            if self._keep:
                for part, host in _parts(content, self._copies[number]):
                    part.copy_(host)
            else:
                content.zero_()
        self.present = True


def host_memory(num_bytes: int, pinned: bool) -> list[Tensor]:
    """Memory of `num_bytes` in all, in parts whose sizes are powers of two, but for less than PART_BYTES.

    torch takes pinned memory in powers of two: of one part, nearly half could lie idle.
    """
    parts = []
    while num_bytes:
        size = 1 << (num_bytes.bit_length() - 1) if num_bytes > PART_BYTES else num_bytes
        parts.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        num_bytes -= size
    return parts


def _parts(content: Tensor, hosts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece of `content` with its place in host memory."""
    return zip(content.split([host.numel() for host in hosts]), hosts, strict=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class EngineResidence:
    """The states of one engine: on the device where they are asked for, and else in host memory."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        optimizer: Any | None,
        free_cached: Callable[[], None],
        enabled: bool,
        shared: bool = False,
    ) -> None:
        """Of these models and Megatron's optimizer, if they learn; `free_cached` gives the device's cache back, also
        of states that stay, where others want the device's memory between work (`shared`)."""
        self._models, self._optimizer, self._free_cached, self._enabled = (
            models,
            optimizer,
            free_cached,
            enabled,
        )
        self._shared = shared
        self._states: dict[str, Residents] = {}
        if enabled:
            self._find()
            self._leave()
        elif shared:
            free_cached()

    @contextmanager
    def at_work(self, *names: str) -> Iterator[None]:
        """Have `weights`, `gradients` or `optimizer` on the device meanwhile."""
        if not self._enabled:
            try:
                yield
            finally:
                if self._shared:
                    self._free_cached()
            return
        for name in names:
            self._states[name].enter()
        try:
            yield
        finally:
            if "optimizer" in names:
                self._find()
            self._leave()

    def _leave(self) -> None:
        for residents in self._states.values():
            if residents.present:
                residents.leave()
        self._free_cached()

    def _find(self) -> None:
        """Take stock: the optimizer's first step, and a load, make states of their own."""
        weights = Residents(_weights(self._models))
        gradients = Residents(_gradients(self._models), keep=False, without=[weights])
        optimizer = Residents(_optimizer_state(self._optimizer), without=[weights, gradients])
        found = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
        # What is known already keeps its copies' memory.
        self._states = {
            name: known
            if (known := self._states.get(name)) is not None and known.same_as(residents)
            else residents
            for name, residents in found.items()
        }


def _weights(models: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    for model in models:
        yield from (parameter.data for parameter in model.parameters())
        for module in model.modules():  # model.buffers() is something else in Megatron's DDP
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        yield from (
            buffer.param_data for buffer in _ddp_buffers(model) if buffer.param_data is not None
        )


def _gradients(models: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    for model in models:
        yield from (buffer.grad_data for buffer in _ddp_buffers(model))


def _ddp_buffers(model: torch.nn.Module) -> list[Any]:
    """Megatron's contiguous buffers; none of a model that does not learn."""
    if not hasattr(model, "expert_parallel_buffers"):
        return []
    return [*model.buffers, *model.expert_parallel_buffers]


def _optimizer_state(optimizer: Any | None) -> Iterator[Tensor]:
    """Moments and main weights."""
    if optimizer is None:
        return
    for megatron in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = megatron.optimizer
        for group in inner.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
