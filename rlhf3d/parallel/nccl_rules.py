"""A backend of torch.distributed on CPU that keeps NCCL's rules, over gloo.

What would hang or corrupt on GPUs fails here.

Invariant: what passes here is legal on NCCL, as far as these rules go:
* two ranks of a group are never on one device;
* messages of one communicator are taken in the order in which they were started, and each waits
  for its peer's: two ranks that send to each other must do so in one group (`batch_isend_irecv`),
  and a message in a group is not matched by one outside;
* a message has the size that its receiver expects;
* a message is read from memory as late as its `wait` allows, and the memory belongs to whoever has
  it then: what was freed before arrives as NaN; and what is received stays NaN until its `wait`.

Collectives are gloo's own.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

NAME = "nccl_rules"
LATE_S = 0.02
"""A message is read this late where nobody waits for it earlier."""
POISON = 0xFF
"""A float of these bytes is NaN in every format."""


class RuleBroken(RuntimeError):
    """A use that NCCL refuses, or that never ends on it."""


@dataclass
class Message:
    """One message in flight."""

    kind: Literal["send", "receive"]
    peer: int
    tensor: torch.Tensor
    """NCCL keeps this object alive, but not its first memory: `tensor.data` may be replaced."""
    memory: StorageWeakRef = field(init=False)
    arrived: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        tensor = self.tensor
        self.memory = StorageWeakRef(tensor.untyped_storage())
        self.place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        self.num_bytes = tensor.numel() * tensor.element_size()
        self.arrived = torch.empty(self.num_bytes, dtype=torch.uint8)
        if self.kind == "receive":
            _as_bytes(tensor).fill_(POISON)

    def view(self) -> torch.Tensor | None:
        """Return the memory it had at the start; None where that was freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        if storage is None:
            return None
        return torch.empty(0, dtype=self.tensor.dtype).set_(storage, *self.place)


class Unit:
    """Messages that NCCL takes as one, with the interface of a torch.distributed work."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = list(messages)
        self.wanted, self.ended = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._delivered = False

    def is_completed(self) -> bool:
        """Return whether it has ended; whoever asks is assumed to keep the memory."""
        self.wanted.set()
        return self.ended.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait, after which the memory may be used. Raises RuleBroken."""
        self.wanted.set()
        if not self.ended.wait(None if timeout is None else timeout.total_seconds()):
            return False
        if self.error is not None:
            raise RuleBroken(str(self.error)) from self.error
        if not self._delivered:
            self._deliver()
        return True

    def _deliver(self) -> None:
        self._delivered = True
        for message in self.messages:
            if message.kind == "send":
                continue
            place = message.view()
            if place is None:
                raise RuleBroken(
                    f"a message from rank {message.peer} was received into memory that was freed"
                )
            place.copy_(message.arrived.view(place.dtype).view(place.shape))


class NCCLRules(dist.ProcessGroup):
    """A process group that keeps the module's rules."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._rank, self._timeout = rank, timeout
        self._collectives = dist.ProcessGroup(store, rank, size)
        # A prefix each: both gloo groups would otherwise write the same keys of the store.
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("collectives", store), rank, size, timeout)
        self._collectives._register_backend(
            torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo
        )
        self._messages = dist.ProcessGroupGloo(
            dist.PrefixStore("messages", store), rank, size, timeout
        )
        self._lanes: dict[str, queue.SimpleQueue[Unit]] = {}
        self._group: list[Message] | None = None
        self._one_communicator = False
        _refuse_shared_devices(store, rank, size)

    def getBackendName(self) -> str:
        """Return the name under which it is registered."""
        return NAME

    def eager_connect_single_device(self, device: torch.device | None = None) -> None:
        """Make the group's communicator, which messages outside of groups then use too."""
        self._one_communicator = True

    @property
    def communicators(self) -> set[str]:
        """The communicators that messages have opened: `all`, and pairs of ranks as `0-1`."""
        return set(self._lanes)

    def _start_coalescing(self, device: torch.device | None = None) -> None:
        assert self._group is None, "a group of messages is open already"
        self._group = []

    def _end_coalescing(self, device: torch.device | None = None) -> Unit:
        assert self._group is not None, "no group of messages is open"
        messages, self._group = self._group, None
        return self._begin("all", messages)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Unit | None:
        """Start to send a tensor."""
        return self._take(Message("send", peer, tensors[0]))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Unit | None:
        """Start to receive a tensor."""
        return self._take(Message("receive", peer, tensors[0]))

    def _take(self, message: Message) -> Unit | None:
        if self._group is not None:
            self._group.append(message)
            return None
        pair = f"{min(self._rank, message.peer)}-{max(self._rank, message.peer)}"
        return self._begin("all" if self._one_communicator else pair, [message])

    def _begin(self, communicator: str, messages: list[Message]) -> Unit:
        unit = Unit(messages)
        if communicator not in self._lanes:
            self._lanes[communicator] = queue.SimpleQueue()
            # A daemon: a lane that waits for its peer does not keep the process alive.
            threading.Thread(target=self._serve, args=(communicator,), daemon=True).start()
        self._lanes[communicator].put(unit)
        return unit

    def _serve(self, communicator: str) -> None:
        """Take the units of a communicator in order; after a failure every further one fails."""
        lane = self._lanes[communicator]
        broken: Exception | None = None
        # Three tags per communicator: two for sizes, one for contents.
        first_tag = 1 if communicator == "all" else 4
        while True:
            unit = lane.get()
            unit.error = broken
            if broken is None:
                try:
                    self._exchange(unit, first_tag)
                except Exception as error:
                    unit.error = broken = error
            unit.ended.set()

    def _exchange(self, unit: Unit, tag: int) -> None:
        """Exchange the sizes of the messages, then their contents."""
        # All are started before any is awaited: in one group two ranks may send to each other.
        sizes, works = [], []
        for message in unit.messages:
            sends = message.kind == "send"
            own, theirs = torch.tensor([message.num_bytes]), torch.zeros(1, dtype=torch.long)
            works.append(self._messages.send([own], message.peer, tag if sends else tag + 1))
            answer = self._messages.recv([theirs], message.peer, tag + 1 if sends else tag)
            sizes.append((message, theirs, answer))
        for message, theirs, work in sizes:
            self._meet(message, work)
            if int(theirs) != message.num_bytes:
                there = "receives" if message.kind == "send" else "sends"
                raise RuleBroken(
                    f"rank {self._rank} {message.kind}s {message.num_bytes} bytes, and rank "
                    f"{message.peer} {there} {int(theirs)}"
                )
        # As late as allowed, to catch a sender that frees or changes the memory too early.
        unit.wanted.wait(LATE_S)
        for message in unit.messages:
            if message.kind == "receive":
                works.append(self._messages.recv([message.arrived], message.peer, tag + 2))
                continue
            memory = message.view()
            if memory is None:
                content = message.arrived.fill_(POISON)
            else:
                content = _as_bytes(memory.contiguous())
            works.append(self._messages.send([content.flatten()], message.peer, tag + 2))
        for work in works:
            work.wait(self._timeout)

    def _meet(self, message: Message, work: Any) -> None:
        """Wait for the peer to start its side."""
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            way = "to" if message.kind == "send" else "from"
            raise RuleBroken(
                f"rank {self._rank} {message.kind}s {way} rank {message.peer}, which does not "
                f"start its side of it within {self._timeout.total_seconds():g} s: it waits for a "
                "message that it started before, or one side is in a group of messages and the "
                "other is not"
            ) from error


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)


def _refuse_shared_devices(store: Any, rank: int, size: int) -> None:
    """Exchange the ranks' hosts and devices. Raises RuleBroken where two ranks share a device."""
    number = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = f"{os.uname().nodename} GPU {number}" if number else f"process {os.getpid()}"
    store.set(f"device of {rank}", device)
    devices = [store.get(f"device of {other}").decode() for other in range(size)]
    twins = [other for other in range(size) if devices[other] == devices[rank] and other != rank]
    if twins:
        raise RuleBroken(f"ranks {rank} and {twins[0]} of a group are both on {devices[rank]}")


def _delegate(name: str) -> Any:
    def collective(self: NCCLRules, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._collectives, name)(*args, **kwargs)

    return collective


_COLLECTIVES = (
    "all|barrier|broadcast|gather|reduce|scatter|monitored|_allgather|_reduce|_get_backend"
)
for _name in dir(dist.ProcessGroup):
    if re.match(_COLLECTIVES, _name):
        setattr(NCCLRules, _name, _delegate(_name))


def register() -> None:
    """Make `nccl_rules` a backend of torch.distributed, and its batches of messages groups."""
    if NAME.upper() in dist.Backend._plugins:
        return
    dist.Backend.register_backend(NAME, NCCLRules, devices=["cpu"])
    plain = dist.batch_isend_irecv

    def batch_isend_irecv(ops: list[dist.P2POp]) -> list[Any]:
        group = ops[0].group or dist.group.WORLD
        if not isinstance(group, NCCLRules):
            return plain(ops)
        group._start_coalescing()
        for op in ops:
            op.op(op.tensor, group=op.group, tag=op.tag, **{f"group_{_side(op)}": op.group_peer})
        return [group._end_coalescing()]

    dist.batch_isend_irecv = batch_isend_irecv


def _side(op: dist.P2POp) -> str:
    return "dst" if op.op is dist.isend else "src"
