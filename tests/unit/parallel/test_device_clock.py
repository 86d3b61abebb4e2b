"""Stamps of a device on its host's clock, with a device stood in for."""

from __future__ import annotations

import time

import pytest
import torch

from rlhf3d.observability.profile.clock import HostClock
from rlhf3d.parallel.device_clock import DeviceClock
from rlhf3d.parallel.platform import CPUPlatform


class Device:
    """Work is behind the host by so much; events are taken as the device comes to them."""

    behind_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms: float | None = None

    def record(self) -> None:
        self.at_ms = 1e3 * time.monotonic() + Device.behind_ms

    def synchronize(self) -> None:
        assert self.at_ms is not None

    def elapsed_time(self, other: Device) -> float:
        assert self.at_ms is not None and other.at_ms is not None
        return other.at_ms - self.at_ms


def test_a_stamp_is_when_the_device_came_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Device, "behind_ms", 0.0)
    clock = DeviceClock()
    Device.behind_ms = 250.0  # the host has queued that much
    asked = time.monotonic_ns()
    late = clock.ns(clock.stamp()) - asked
    assert 200e6 <= late <= 300e6 + time.monotonic_ns() - asked


def test_the_cpu_is_its_own_clock() -> None:
    clock = CPUPlatform("test").clock()
    assert isinstance(clock, HostClock)
    before = time.monotonic_ns()
    assert before <= clock.ns(clock.stamp()) <= time.monotonic_ns()
