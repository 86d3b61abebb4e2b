"""Freed memory on CPU, by the pages that the kernel has to hand out again."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

# In a process of its own: the settings last as long as the process.
SCRIPT = """
import resource
import torch
from rlhf3d.parallel.host_allocator import keep_freed
from rlhf3d.parallel.platform import CPUPlatform

def pages(count, mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(mib << 20, dtype=torch.uint8) for _ in range(count)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""
RANK = """
cpu = CPUPlatform("test")
found = [pages(8, 16), pages(8, 16)]
cpu._bind_device()
found += [pages(8, 16), pages(8, 16)]
cpu.free_cached()
print(*found, pages(8, 16))
"""
DRIVER = """
found = [pages(2, 64), pages(2, 64)]
keep_freed()
print(*found, *(pages(2, 64) for _ in range(6)), pages(2, 48))
"""
ALL = (128 << 20) // resource.getpagesize() // 2
"""What a round takes at least where the kernel hands its pages out again."""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def pages_of(rounds: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + rounds],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    first, upstream, _, kept, given_back = pages_of(RANK)
    assert first > ALL and upstream > ALL and given_back > ALL
    assert kept < ALL / 4


def test_blocks_of_every_size_are_kept_where_they_come_and_go_alike() -> None:
    # A small block may have taken the end of a large one's place: it is made again, once or twice.
    first, upstream, _, *rounds, smaller = pages_of(DRIVER)
    assert first > ALL and upstream > ALL
    assert sum(rounds) < len(rounds) * ALL and max(rounds[-2:]) < ALL / 4 and smaller < ALL / 4
