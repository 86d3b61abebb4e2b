"""Bundles of a run."""

from __future__ import annotations

import pytest

from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.placement.resources import place

CPU, CUDA = CPUPlatform(reason="test"), CUDAPlatform(reason="test")


def test_cpu_engines_have_their_own_bundles() -> None:
    placement = place(CPU, world_size=4, engines=2, engine_ranks=2)
    assert placement.bundles == [{"CPU": 1.0}] * 4 + [{"CPU": 2.0}] * 2
    assert placement.engine_bundles == [4, 5]


def test_cuda_engines_share_the_trainers_gpus() -> None:
    placement = place(CUDA, world_size=8, engines=8, engine_ranks=1)
    assert placement.bundles == [{"GPU": 1.0, "CPU": 2.0}] * 8
    assert placement.engine_bundles == list(range(8))
    assert placement.train_options["num_gpus"] + placement.engine_options["num_gpus"] == 1


@pytest.mark.parametrize(("engines", "ranks", "key"), [(4, 2, "tensor_parallel_size"), (9, 1, "rollout.engines")])
def test_cuda_refuses_what_it_cannot_place(engines: int, ranks: int, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        place(CUDA, world_size=8, engines=engines, engine_ranks=ranks)
