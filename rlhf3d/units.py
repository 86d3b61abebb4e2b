"""Bytes, counts, names and durations: the factors, arithmetic and texts that rooms share.

Invariant: imports nothing of the package; each of these facts stands here alone.
"""

from __future__ import annotations

from collections.abc import Sequence

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NS = 10**9
"""Of a second."""

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
"""Bytes of a number, by dtype."""

OPTIMIZER_BYTES = {"bfloat16": 12, "float32": 8}
"""Optimizer state of a trained weight: Adam's two moments, and the fp32 copy of a bf16 weight."""


def checkpoint_bytes(weights: int, dtype: str, optimizer: bool) -> int:
    """Return what N trained `weights` take in a checkpoint, with or without their optimizer."""
    optimizer_bytes = OPTIMIZER_BYTES[dtype] if optimizer else 0
    return weights * (ITEM_BYTES[dtype] + optimizer_bytes)


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `number`."""
    return ceil_div(number, multiple) * multiple


def ceil_div(number: int, divisor: int) -> int:
    """Return `number / divisor`, rounded up."""
    return -(-number // divisor)


def size_unit(count: float) -> tuple[str, int]:
    """Return the largest binary unit that `count` bytes reach, and its bytes."""
    for name, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return name, size
    return "B", 1


def format_bytes(count: float) -> str:
    """Return bytes in the unit that suits them: `1.50 GiB`, `512.00 KiB`; `0` for none."""
    name, size = size_unit(count)
    return f"{count / size:.2f} {name}" if count else "0"


def counted(count: int, what: str) -> str:
    """Return `1 step`, `2 steps`: of what has a plural in s, or in es after `ch`."""
    plural = "es" if what.endswith("ch") else "s"
    return f"{count} {what}{'' if count == 1 else plural}"


def some(names: Sequence[str]) -> str:
    """Return the first names and how many others there are: `a, b, c and 4 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def format_clock(seconds: float) -> str:
    """Return seconds as `m:ss`, from an hour on as `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
