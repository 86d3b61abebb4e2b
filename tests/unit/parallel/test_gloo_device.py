"""Groups of gloo that share a device: one thread, and each group's own messages."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf3d.parallel.gloo_device import share_device
from tests.support.ranks import run_ranks

GROUPS = 6
WAIT = timedelta(seconds=30)


def threads_of_gloo() -> int:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("gloo_tcp") for name in names)


def sums(rank: int, port: int, share: bool) -> tuple[int, list[float]]:
    """How many threads look for messages, and the sum of the ranks in each group, times its number.

    All groups' sums are under way at once, and ranks start them in orders of their own.
    """
    if share:
        share_device()
        share_device()
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=WAIT
    )
    groups = [dist.new_group([0, 1], timeout=WAIT) for _ in range(GROUPS)]
    numbers = [torch.full((50_000,), float(rank + 1) * (i + 1)) for i in range(GROUPS)]
    order = range(GROUPS) if rank == 0 else reversed(range(GROUPS))
    works = [dist.all_reduce(numbers[i], group=groups[i], async_op=True) for i in order]
    for work in works:
        work.wait()
    assert all(bool((each == each[0]).all()) for each in numbers)
    return threads_of_gloo(), [float(each[0]) for each in numbers]


def test_groups_of_a_process_share_one_thread_and_no_messages() -> None:
    expected = [3.0 * (i + 1) for i in range(GROUPS)]
    assert run_ranks(2, sums, False) == [(GROUPS + 1, expected)] * 2
    assert run_ranks(2, sums, True) == [(1, expected)] * 2


def loopback(rank: int, port: int) -> tuple[int, list[float]]:
    """The user names the interface."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return sums(rank, port, True)


def test_the_users_interface_stands() -> None:
    expected = [3.0 * (i + 1) for i in range(GROUPS)]
    assert run_ranks(2, loopback) == [(1, expected)] * 2
