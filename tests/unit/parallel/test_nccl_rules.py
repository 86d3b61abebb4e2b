"""The back end with NCCL's rules: what is legal arrives, and each thing that NCCL refuses, or
corrupts, fails here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import RankError, run_ranks

from rlhf3d.parallel import nccl_rules

SHORT, LONG = timedelta(seconds=2), timedelta(seconds=60)


def run(rank: int, port: int, body: Callable[[int], Any], timeout: timedelta = LONG) -> Any:
    nccl_rules.register()
    dist.init_process_group(
        nccl_rules.NAME,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timeout,
    )
    return body(rank)


def both_ways_in_a_group(rank: int) -> list[float]:
    mine, theirs = torch.full((3, 2), float(rank)), torch.empty(3, 2)
    ops = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, theirs, 1 - rank)]
    (work,) = dist.batch_isend_irecv(ops)
    assert theirs.isnan().all()  # nobody waited
    work.wait()
    return theirs.flatten().tolist()


def both_ways_alone(rank: int) -> None:
    """gloo, which buffers, lets it pass."""
    works = [dist.isend(torch.ones(2), 1 - rank), dist.irecv(torch.empty(2), 1 - rank)]
    for work in works:
        work.wait()


def other_size(rank: int) -> None:
    (dist.isend(torch.ones(3), 1) if rank == 0 else dist.irecv(torch.ones(2), 0)).wait()


def group_and_lone(rank: int) -> None:
    if rank == 0:
        dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(2), 1)])[0].wait()
    else:
        dist.recv(torch.ones(2), 0)


def freed_before_the_wait(rank: int, alias: bool) -> list[float]:
    """As Megatron's schedules free an activation that they are sending."""
    tensor = torch.ones(4)
    if rank == 0:
        work = dist.isend(tensor.detach() if alias else tensor, 1)
        tensor.data = torch.empty(1)
    else:
        work = dist.irecv(tensor, 0)
    work.wait()
    return tensor.tolist()


def collectives(rank: int) -> list[float]:
    total, parts = torch.full((2,), rank + 1.0), [torch.empty(1) for _ in range(2)]
    dist.all_reduce(total)
    dist.all_gather(parts, torch.full((1,), float(rank)))
    dist.barrier()
    return [*total.tolist(), *torch.cat(parts).tolist()]


def freed(rank: int) -> list[float]:
    return freed_before_the_wait(rank, alias=False)


def aliased(rank: int) -> list[float]:
    return freed_before_the_wait(rank, alias=True)


def test_what_is_legal_arrives() -> None:
    assert run_ranks(2, run, both_ways_in_a_group) == [[1.0] * 6, [0.0] * 6]
    assert run_ranks(2, run, collectives) == [[3.0, 3.0, 0.0, 1.0]] * 2
    assert run_ranks(2, run, aliased)[1] == [1.0] * 4


def test_memory_freed_before_the_wait_arrives_as_nan() -> None:
    assert torch.tensor(run_ranks(2, run, freed)[1]).isnan().all()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (both_ways_alone, "start its side of it within 2 s"),
        (group_and_lone, "one side is in a group of messages and the other is not"),
        (other_size, "sends 12 bytes, and rank 1 receives 8|receives 8 bytes, and rank 0 sends 12"),
    ],
)
def test_what_would_hang_fails(body: Callable[[int], Any], problem: str) -> None:
    timeout = SHORT if body is both_ways_alone else LONG
    with pytest.raises(RankError, match=problem):
        run_ranks(2, run, body, timeout, timeout_s=120)


def on_one_gpu(rank: int, port: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "3"
    run(rank, port, collectives)


def test_two_ranks_on_one_gpu_are_refused() -> None:
    with pytest.raises(RankError, match=r"ranks \d and \d of a group are both on .* GPU 3"):
        run_ranks(2, on_one_gpu)
