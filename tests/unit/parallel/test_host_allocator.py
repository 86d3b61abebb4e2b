"""Freed memory on CPU, by the pages that the kernel has to hand out again."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

# In a process of its own: the setting lasts as long as the process.
SCRIPT = """
import resource
import torch
from rlhf3d.parallel.platform import CPUPlatform

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(8)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cpu = CPUPlatform("test")
found = [pages(), pages()]
cpu._bind_device()
found += [pages(), pages()]
cpu.free_cached()
print(*found, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120
    )
    first, upstream, _, kept, given_back = map(int, done.stdout.split())
    complete = (8 * 16 << 20) // resource.getpagesize() // 2
    assert first > complete and upstream > complete and given_back > complete
    assert kept < complete / 4
