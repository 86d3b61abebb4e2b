"""`rlhf3d.units`: texts of sizes and durations, and rounding."""

from __future__ import annotations

from rlhf3d.units import GIB, checkpoint_bytes, counted, format_bytes, format_clock, round_up


def test_format_clock() -> None:
    assert [format_clock(s) for s in (0, 59.6, 730, 3661)] == ["0:00", "1:00", "12:10", "1:01:01"]


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 10, 1536, GIB)] == ["0", "10.00 B", "1.50 KiB", "1.00 GiB"]


def test_counted() -> None:
    found = [counted(n, "mini-batch") for n in (0, 1, 2)] + [counted(2, "step")]
    assert found == ["0 mini-batches", "1 mini-batch", "2 mini-batches", "2 steps"]


def test_round_up() -> None:
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_checkpoint_bytes() -> None:
    assert checkpoint_bytes(10, "bfloat16", optimizer=True) == 140
    assert checkpoint_bytes(10, "float32", optimizer=False) == 40
