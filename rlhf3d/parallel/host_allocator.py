"""Memory of freed tensors on CPU: kept for the next ones, or given back.

Invariant: changes where freed memory goes, never a number. By itself the C library gives the end of
its heap back whenever it is free, so that activations of every micro-batch take new pages, which
the kernel has to fill with zeros. With another C library than glibc nothing changes.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed() -> None:
    """Keep the heap of this process as large as it was, with the main thread's large blocks in it.

    For a process whose large blocks come and go in about the same sizes, as a rank's gradients of
    the vocabulary and the driver's columns do: what holes they leave, the next ones fill. It lasts
    as long as the process. Other threads have heaps of at most 64 MiB, and larger blocks outside of
    them as before.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed() -> None:
    """Give the kernel what `keep_freed` kept."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
