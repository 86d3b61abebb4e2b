"""Process groups agree with ParallelLayout, and waits on them end.

They can be left and joined again.
"""

from __future__ import annotations

import os
import time
from dataclasses import astuple

import pytest
from support import gpu_set
from support.ranks import run_ranks

import megatron_patches
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.meeting import open_meeting
from rlhf3d.parallel.megatron_init import destroy_megatron, initialize_megatron
from rlhf3d.parallel.platform import CPUPlatform

pytestmark = pytest.mark.gpu_set
PLATFORM = CPUPlatform("test")


def test_megatron_is_the_one_that_was_put_first() -> None:
    import megatron.core

    first = str(gpu_set.folder("megatron-core")) in os.environ.get("PYTHONPATH", "").split(":")
    found = megatron.core.__version__.partition("+")[
        0
    ]  # then the commit of whatever repository it lies in
    assert found == megatron_patches.installed_version()
    assert (found == gpu_set.version("megatron-core")) == first


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    """Megatron imported once, before ranks are forked."""
    megatron_patches.apply("cpu")
    import megatron.core.parallel_state  # noqa: F401


def coordinates(rank: int, port: int, layout: ParallelLayout) -> tuple[int, ...]:
    """Coordinates that Megatron gives this rank, and the sum of its data-parallel group."""
    import torch
    from megatron.core import parallel_state as mpu

    initialize_megatron(layout, rank, 1, PLATFORM, 60, master_port=port)
    total = torch.tensor(rank)
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
    own = (
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_data_parallel_rank(),
        mpu.get_expert_model_parallel_rank(),
        mpu.get_context_parallel_rank(),
    )
    return *own, int(total)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(2, 2, 2),
        ParallelLayout(3, 2, 1),
        ParallelLayout(1, 2, 2, vpp=2),
        ParallelLayout(2, 2, 2, ep=2),
        ParallelLayout(2, 1, 4, ep=4),
        ParallelLayout(2, 1, 2, cp=2),
    ],
    ids=str,
)
def test_ranks_are_where_the_layout_says(layout: ParallelLayout) -> None:
    for rank, (*own, total) in enumerate(run_ranks(layout.world_size, coordinates, layout)):
        place = layout.coords(rank)
        assert tuple(own) == astuple(place)
        assert total == sum(layout.rank(place.tp, place.pp, d, place.cp) for d in range(layout.dp))


def twice(rank: int, port: int) -> list[float]:
    """Join, leave and join with another layout: seeded draws of both lives."""
    import torch

    draws = []
    for layout in (ParallelLayout(tp=2), ParallelLayout(dp=2)):
        initialize_megatron(layout, rank, 5, PLATFORM, 60, master_port=port)
        draws.append(torch.rand(1).item())
        next_port = [open_meeting() if rank == 0 else 0]
        torch.distributed.broadcast_object_list(next_port)
        port = next_port[0]
        destroy_megatron()
    return draws


def test_a_world_can_be_left_and_joined_again() -> None:
    results = run_ranks(2, twice)
    assert len({draw for draws in results for draw in draws}) == 1


def alone(rank: int, port: int) -> float:
    """Seconds until rank 0 of two gives up waiting for the other."""
    start = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)timed? ?out"):
        initialize_megatron(ParallelLayout(dp=2), 0, 1, PLATFORM, 2, master_port=port)
    return time.monotonic() - start


def test_a_missing_rank_is_not_waited_for_beyond_the_deadline() -> None:
    assert run_ranks(1, alone, timeout_s=120)[0] < 50


def prepared(rank: int, port: int) -> tuple[int, str]:
    import os

    import torch

    PLATFORM.prepare_worker(threads=3)
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def test_prepared_worker_has_its_threads() -> None:
    assert run_ranks(1, prepared) == [(3, "3")]
