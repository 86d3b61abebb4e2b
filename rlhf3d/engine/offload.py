"""Model states in host memory while other work has the device.

Invariant: a tensor keeps its identity, its views and its bits over `offload` and `restore`; between
the two its storage on the device is empty, and touching it is a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PART_BYTES = 1 << 20


class Storages:
    """Storages that leave the device and return together."""

    def __init__(
        self, tensors: Iterable[Tensor], keep: bool = True, without: Iterable[Storages] = ()
    ) -> None:
        """Take the storages of `tensors`, each once, except those of `without`.

        Unless `keep`, they return as zeros.
        """
        others: set[int] = set()
        for group in without:
            others |= group._storages.keys()
        self._storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # The address of the C++ storage: all views of one storage have the same.
            if storage._cdata not in others:
                self._storages[storage._cdata] = storage
        self._keep = keep
        self._copies: dict[int, list[Tensor]] = {}
        self._sizes: dict[int, int] = {}
        self.present = True

    def same_as(self, other: Storages) -> bool:
        """Return whether both are of the same storages."""
        return self._storages.keys() == other._storages.keys()

    def offload(self) -> None:
        """Copy the contents to host memory and free the device's."""
        assert self.present, "these states are offloaded already"
        for number, storage in self._storages.items():
            self._sizes[number] = storage.nbytes()
            if self._keep:
                # The copies stay allocated from one time to the next: pinning memory is slow.
                if number not in self._copies:
                    pinned = storage.device.type != "cpu"
                    self._copies[number] = host_memory(storage.nbytes(), pinned)
                for part, host in _parts(_bytes(storage), self._copies[number]):
                    host.copy_(part)
            # Tensors keep this storage, their shape and strides: only its memory is freed.
            storage.resize_(0)
        self.present = False

    def restore(self) -> None:
        """Take device memory again and copy the contents back."""
        assert not self.present, "these states are on the device already"
        for number, storage in self._storages.items():
            storage.resize_(self._sizes[number])
            content = _bytes(storage)
            if self._keep:
                for part, host in _parts(content, self._copies[number]):
                    part.copy_(host)
            else:
                # What resize_ allocates has arbitrary contents.
                content.zero_()
        self.present = True


def host_memory(num_bytes: int, pinned: bool) -> list[Tensor]:
    """Allocate `num_bytes` in parts whose sizes are powers of two, except below PART_BYTES.

    torch takes pinned memory in powers of two: of one part, nearly half could be unused.
    """
    parts = []
    while num_bytes:
        size = 1 << (num_bytes.bit_length() - 1) if num_bytes > PART_BYTES else num_bytes
        parts.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        num_bytes -= size
    return parts


def _parts(content: Tensor, hosts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each part of `content` with its place in host memory."""
    return zip(content.split([host.numel() for host in hosts]), hosts, strict=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    # A view of the whole storage as bytes, whatever the dtype of its tensors.
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class ModelStates:
    """The states of one engine: on the device while they are in use, otherwise in host memory."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        optimizer: Any | None,
        free_cached: Callable[[], None],
        offload: bool,
        shared: bool = False,
    ) -> None:
        """Take the states of these models and of Megatron's optimizer, if they learn.

        `offload` moves them. `free_cached` releases the device memory that torch keeps; with
        `shared`, where others need the device between calls, it is called for states that stay too.
        """
        self._models, self._optimizer = models, optimizer
        self._free_cached, self._offloads, self._shared = free_cached, offload, shared
        self._states: dict[str, Storages] = {}
        if offload:
            self._find()
            self._leave()
        elif shared:
            free_cached()

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Keep `weights`, `gradients` or `optimizer` on the device meanwhile."""
        if not self._offloads:
            try:
                yield
            finally:
                if self._shared:
                    self._free_cached()
            return
        for name in names:
            self._states[name].restore()
        try:
            yield
        finally:
            if "optimizer" in names:
                self._find()
            self._leave()

    def _leave(self) -> None:
        for storages in self._states.values():
            if storages.present:
                storages.offload()
        # torch keeps the memory of emptied storages; other processes get it from here on.
        self._free_cached()

    def _find(self) -> None:
        """List the storages again: the optimizer's first step, and a load, allocate new ones."""
        weights = Storages(_weights(self._models))
        # Each optimizer step zeroes the gradients first: their contents need no copy.
        gradients = Storages(_gradients(self._models), keep=False, without=[weights])
        optimizer = Storages(_optimizer_state(self._optimizer), without=[weights, gradients])
        current = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
        for name, storages in current.items():
            known = self._states.get(name)
            # A known one has host memory already, which is kept.
            if known is None or not known.same_as(storages):
                self._states[name] = storages


def _weights(models: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    for model in models:
        yield from (parameter.data for parameter in model.parameters())
        for module in model.modules():  # model.buffers() is something else in Megatron's DDP
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        for buffer in _ddp_buffers(model):
            if buffer.param_data is not None:
                yield buffer.param_data


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
