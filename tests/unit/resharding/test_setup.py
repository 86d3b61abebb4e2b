"""What processes derive from a setup: the same everywhere, buckets in an order of each
destination's own.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.as_gpu import AsGPUPlatform
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform, Platform
from rlhf3d.resharding.setup import SyncSetup, sync_setup
from rlhf3d.resharding.sites import Sites

SPEC = ModelSpec(
    "llama", 8, 32, num_heads=4, num_kv_heads=4, head_dim=8, ffn_size=64, vocab_size=128
)
SETUP = SyncSetup(
    name="test",
    spec=SPEC,
    layout=ParallelLayout(tp=2, pp=2, dp=2),
    style="local",
    sites=Sites.gpus(8, 8),
    dtype="float32",
    bucket_bytes=20_000,
    timeout_s=1.0,
    engines=4,
    tensor_parallel_size=2,
)


def test_destinations_begin_at_different_places() -> None:
    orders = [SETUP.buckets(place.number) for place in SETUP.plan.destinations]
    assert len({order[0] for order in orders}) == len(orders) == 8
    assert all(order[0].segments[0].rows[0] == 0 for order in orders)
    assert all(sorted(order, key=repr) == sorted(orders[0], key=repr) for order in orders)
    begun = [
        SETUP.copies(dst, sender)[0] for dst in range(8) for sender in SETUP.plan.senders_to(dst)
    ]
    assert {copy.sender for copies in begun for copy in copies} == set(range(8))


def test_another_process_derives_the_same() -> None:
    other = pickle.loads(pickle.dumps(SETUP))
    assert other == SETUP and other.ring_shape(3) == SETUP.ring_shape(3)
    changed = replace(SETUP, bucket_bytes=30_000)
    assert changed.ring_shape(3).digest != SETUP.ring_shape(3).digest


def test_who_reaches_whom() -> None:
    for place in SETUP.plan.destinations:
        assert [rank for rank in range(8) if SETUP.is_near(rank, place.number)] == [place.device]
        assert SETUP.owner(place.number) == place.device
    assert SETUP.needs_messages and SETUP.message_ranks == tuple(
        f"training rank {rank}" for rank in range(8)
    )
    one_host = replace(SETUP, sites=Sites.hosts([0] * 8))
    assert not one_host.needs_messages and one_host.owner(0) == 0
    apart = replace(SETUP, colocated=False)
    assert apart.message_ranks[8:] == tuple(
        f"engine {e} rank {r}" for e in range(4) for r in range(2)
    )


@pytest.mark.parametrize(
    ("platform", "one_each", "on_gpu"),
    [
        (CPUPlatform("test"), False, False),
        (AsGPUPlatform("test"), True, False),
        (CUDAPlatform("test"), True, True),
    ],
)
def test_devices_and_memory_of_buckets_are_the_platforms(
    platform: Platform, one_each: bool, on_gpu: bool
) -> None:
    rollout = RolloutConfig(dtype="float32")
    setup = sync_setup(rollout, SPEC, ParallelLayout(tp=2), platform, "test", [0, 0])
    assert setup.sites == (Sites.gpus(2, 2) if one_each else Sites.hosts([0, 0]))
    assert setup.ring_shape(0).on_gpu is on_gpu
    # The driver, which reads an export, holds no GPU.
    assert not replace(setup, target="export").ring_shape(0).on_gpu
