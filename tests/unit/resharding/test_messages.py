"""A message between ranks ends, or names its peer: gone, late, or over the sync's deadline."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from rlhf3d.resharding.messages import Group
from rlhf3d.resharding.ring import SyncError


class Backend:
    """Stands for a process group: `wait` of a work returns or raises what it is told to, after
    `seconds`.
    """

    def __init__(
        self,
        result: bool | RuntimeError = True,
        seconds: float = 0.0,
        start: RuntimeError | None = None,
    ) -> None:
        self.result, self.seconds, self.start, self.calls = result, seconds, start, list[str]()

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Backend:
        self.calls.append(f"send {peer}")
        if self.start:
            raise self.start
        return self

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Backend:
        self.calls.append(f"recv {peer}")
        return self

    def _start_coalescing(self) -> None:
        self.calls.append("[")

    def _end_coalescing(self) -> Backend:
        self.calls.append("]")
        return self

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.calls.append(f"connect {device}")

    def wait(self, timeout: timedelta) -> bool:
        assert timeout.total_seconds() > 0
        time.sleep(self.seconds)
        if isinstance(self.result, RuntimeError):
            raise self.result
        return self.result


def make_stub_group(monkeypatch: pytest.MonkeyPatch, backend: Backend, name: str = "gloo") -> Group:
    for kind in ("ProcessGroupGloo", "ProcessGroupNCCL", "TCPStore"):
        monkeypatch.setattr(torch.distributed, kind, lambda *args, **kwargs: backend, raising=False)
    return Group(
        name, 0, ["training rank 0", "training rank 1", "engine 0 rank 0"], "127.0.0.1", 1, 1.0
    )


MESSAGE = torch.zeros(4, dtype=torch.uint8)
GONE = RuntimeError("Connection closed by peer")


def test_a_peer_gone_before_a_message_starts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_stub_group(monkeypatch, Backend(start=GONE))
    for _ in range(2):
        with pytest.raises(
            SyncError,
            match=r"^sync_weights: a message to engine 0 rank 0: Connection closed by peer$",
        ):
            group.exchange([(MESSAGE, 2)], [])


@pytest.mark.parametrize(
    ("backend", "how"),
    [
        (Backend(GONE), ": Connection closed by peer"),
        (
            Backend(RuntimeError("Timed out"), seconds=0.11),
            " did not end in time; raise rollout.sync_timeout_s",
        ),
        (Backend(False), " did not end in time; raise rollout.sync_timeout_s"),
    ],
    ids=["gone", "late, as gloo says it", "late"],
)
def test_a_lost_message_ends_the_group(
    backend: Backend, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_stub_group(monkeypatch, backend)
    (work,) = group.exchange([], [(MESSAGE, 1)])
    with pytest.raises(SyncError) as lost:
        within_s = 30.0 if how.endswith("peer") else 0.1
        group.finish(work, 1, "a message from", time.monotonic() + within_s)
    assert str(lost.value).startswith(f"sync_weights: a message from training rank 1{how}")
    with pytest.raises(SyncError) as again:
        group.exchange([(MESSAGE, 2)], [])
    assert str(again.value) == str(lost.value) and backend.calls == ["recv 1"]


def test_a_deadline_that_has_passed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_stub_group(monkeypatch, Backend(RuntimeError("waited")))
    with pytest.raises(SyncError, match="a message from training rank 1 did not end in time"):
        group.finish(group.exchange([], [(MESSAGE, 1)])[0], 1, "a message from", time.monotonic())


class Kernel:
    """A work of NCCL's: it ends, or fails, after a number of looks."""

    def __init__(self, looks: float, failure: RuntimeError | None = None) -> None:
        self.looks, self.failure, self.waits = looks, failure, 0

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> bool:
        self.waits += 1
        if self.failure:
            raise self.failure
        return True


def test_a_message_of_nccl_is_looked_at_often_and_has_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL's own wait with a deadline would sleep a millisecond between two looks."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    pauses: list[float] = []
    group = make_stub_group(monkeypatch, Backend(), "nccl")
    monkeypatch.setattr(time, "sleep", pauses.append)
    ended = Kernel(40)
    group.finish(ended, 1, "a message from", time.monotonic() + 5)
    assert ended.waits == 1 and len(pauses) == 40 and max(pauses) <= 1e-4
    with pytest.raises(
        SyncError, match="a message from training rank 1: Connection closed by peer"
    ):
        group.finish(Kernel(1, GONE), 1, "a message from", time.monotonic() + 5)
    with pytest.raises(SyncError, match="a message from engine 0 rank 0 did not end in time"):
        group.finish(Kernel(float("inf")), 2, "a message from", time.monotonic() + 0.01)


def test_a_process_group_has_the_deadline_of_the_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's own is ten minutes."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for backend, kind in (("gloo", "ProcessGroupGloo"), ("nccl", "ProcessGroupNCCL")):
        made: list[tuple[Any, ...]] = []
        make_stub_group(monkeypatch, Backend())
        monkeypatch.setattr(
            torch.distributed, kind, lambda *args, made=made: made.append(args) or Backend()
        )
        Group(backend, 0, ["training rank 0"], "127.0.0.1", 1, 7.0)
        assert made[0][1:] == (0, 1, timedelta(seconds=7))


def test_nccl_takes_every_exchange_as_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one communicator, made at the start: lone and grouped messages would else miss each
    other.
    """
    real = torch.distributed.distributed_c10d.ProcessGroupGloo  # has the methods of every backend
    assert all(
        hasattr(real, name)
        for name in ("eager_connect_single_device", "_start_coalescing", "_end_coalescing")
    )
    assert "device" not in real._start_coalescing.__doc__ + real._end_coalescing.__doc__
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    backend = Backend()
    group = make_stub_group(monkeypatch, backend, "nccl")
    assert group.exchange([(MESSAGE, 1), (MESSAGE, 2)], [(MESSAGE, 1)]) == [backend] * 3
    assert group.exchange([(MESSAGE, 1)], []) == group.exchange([], [(MESSAGE, 2)]) == [backend]
    assert group.exchange([], []) == []
    calls = "connect cuda:3, [, send 1, send 2, recv 1, ], [, send 1, ], [, recv 2, ]"
    assert ", ".join(backend.calls) == calls
