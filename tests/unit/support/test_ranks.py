"""The fork launcher of the multi-rank tests: results, first failure, deadlines, no survivors."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from support.ranks import RankError, run_ranks


def identity(rank: int, port: int, factor: int) -> tuple[int, int, str, str]:
    return rank * factor, port, os.environ["RANK"], os.environ["WORLD_SIZE"]


def large(rank: int, port: int) -> bytes:
    return bytes([rank]) * 3_000_000


def second_rank_raises(rank: int, port: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        while not (folder / "0").exists():
            time.sleep(0.01)
        raise ValueError("boom")
    time.sleep(60)


def second_rank_hangs(rank: int, port: int) -> None:
    if rank == 1:
        time.sleep(60)


def dies(rank: int, port: int) -> None:
    os._exit(7)


def bind(rank: int, port: int, both: Barrier) -> str:
    """What a stranger hears who wants the ranks' port, while rank 0 lives and has it."""
    both.wait(60)
    with socket.socket() as other, pytest.raises(OSError, match="in use") as refused:
        other.bind(("127.0.0.1", port))
    both.wait(60)
    return str(refused.value)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_in_rank_order_and_environment() -> None:
    results = run_ranks(3, identity, 5)
    assert [r[0] for r in results] == [0, 5, 10] and len({r[1] for r in results}) == 1
    assert [r[2:] for r in results] == [("0", "3"), ("1", "3"), ("2", "3")]


def test_nobody_else_gets_the_ranks_port() -> None:
    both = multiprocessing.get_context("fork").Barrier(2)
    assert len(run_ranks(2, bind, both)) == 2


def test_results_larger_than_a_pipe() -> None:
    assert [(len(r), r[0]) for r in run_ranks(2, large)] == [(3_000_000, 0), (3_000_000, 1)]


def test_first_failure_is_raised_and_nobody_survives(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(
        RankError, match=r"(?s)rank 1 of 2 failed first.*second_rank_raises.*ValueError: boom"
    ):
        run_ranks(2, second_rank_raises, tmp_path)
    assert time.monotonic() - start < 20
    assert not any(alive(int((tmp_path / rank).read_text())) for rank in "01")


def test_rank_that_hangs_shows_its_stack() -> None:
    with pytest.raises(
        RankError, match=r"(?s)stacks of rank 1 at the deadline.*in second_rank_hangs"
    ):
        run_ranks(2, second_rank_hangs, timeout_s=3.0)


def test_rank_that_dies_silently_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 1 ended without a result \(status 7\)"):
        run_ranks(1, dies)
