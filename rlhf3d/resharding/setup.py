"""What all processes of a weight sync agree on, and what each derives from it.

Invariant: plan, buckets, copies and shared-memory layout are functions of a `SyncSetup` alone, so
that processes that were given the same one need not tell each other anything more; the digest of
what they derived proves it. Pure: no torch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import LocalParam
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle
from rlhf3d.parallel.platform import Backend, Platform
from rlhf3d.resharding.buckets import ALIGNMENT_BYTES, Bucket, Copy, copies_to, plan_buckets
from rlhf3d.resharding.plan import ReshardPlan
from rlhf3d.resharding.sites import Sites
from rlhf3d.resharding.tables import plan_export, plan_sync
from rlhf3d.units import ITEM_BYTES, round_up

FILE_PREFIX = "rlhf3d-weights-"
SLOTS = 2
"""Buckets in shared memory: one is filled while the other is read."""
RING_HEADER_BYTES = 64
IPC_HANDLE_BYTES = 4096
"""Room for a pickled CUDA IPC handle."""


@dataclass(frozen=True)
class RingShape:
    """Everything that fixes the file's layout; the same in every process."""

    name: str
    senders: tuple[str, ...]
    """Names of the senders, for messages."""
    readers: tuple[str, ...]
    rows: int
    """Copies of the busiest sender in one sync."""
    slot_bytes: int
    on_gpu: bool
    """Whether the slots are in the memory of a GPU, shared by CUDA IPC; the rest is in the file."""
    digest: int
    """Of the plan: a process with another plan is refused."""

    @property
    def table_offset(self) -> int:
        """Bytes before the fingerprint table."""
        return _aligned(RING_HEADER_BYTES + 8 * (len(self.senders) + len(self.readers)))

    @property
    def slots_offset(self) -> int:
        """Bytes before the first slot."""
        return _aligned(self.table_offset + 16 * len(self.senders) * self.rows)

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next."""
        return _aligned(self.slot_bytes)

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.slots_offset + (IPC_HANDLE_BYTES if self.on_gpu else SLOTS * self.slot_stride)

    def path(self) -> Path:
        """In /dev/shm where that exists and has room, else in the temporary folder.

        The same once the file is there.
        """
        shm, temporary = Path("/dev/shm"), Path(tempfile.gettempdir())
        # A file takes room itself: once there, it says where it is, and not the free space.
        for folder in (shm, temporary):
            if (folder / f"{FILE_PREFIX}{self.name}").exists():
                return folder / f"{FILE_PREFIX}{self.name}"
        has_room = (
            # In a container /dev/shm may be as small as 64 MiB.
            shm.is_dir() and os.statvfs(shm).f_bavail * os.statvfs(shm).f_frsize > self.total_bytes
        )
        return (shm if has_room else temporary) / f"{FILE_PREFIX}{self.name}"


@dataclass(frozen=True)
class SyncSetup:
    """One stream of weights from the policy's training ranks.

    It goes to vLLM engines, or to one reader of complete tensors.
    """

    name: str
    """Of this stream, unique on each host."""
    spec: ModelSpec
    layout: ParallelLayout
    style: SpecStyle
    sites: Sites
    dtype: str
    """In which the bytes travel: the receiver's."""
    bucket_bytes: int
    timeout_s: float
    """Deadline of each bucket."""
    target: Literal["engines", "export"] = "engines"
    reader_beside: int = 0
    """Of an export: a training rank on the reader's node."""
    engines: int = 1
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    colocated: bool = True
    """Whether engines share devices with training ranks; else they have devices of their own."""
    backend: Backend = "gloo"
    """What carries messages between devices."""
    weights_on_gpu: bool = False
    """Whether buckets and messages are in GPU memory; engines then read buckets by CUDA IPC."""

    @property
    def item_bytes(self) -> int:
        """Bytes an element."""
        return ITEM_BYTES[self.dtype]

    @property
    def plan(self) -> ReshardPlan:
        """The plan; computed once a process. Raises ValueError as `plan_sync` does."""
        return _plan(self)

    def table(self, dst: int) -> tuple[LocalParam, ...]:
        """The parameters of a destination."""
        return self.plan.engine_tables[self.plan.destinations[dst].index]

    def buckets(self, dst: int) -> tuple[Bucket, ...]:
        """The buckets of a destination, in its order.

        Destinations begin at different places of the model, so that not all wait for the same
        pipeline stage at once.
        """
        buckets = _buckets(self, self.plan.destinations[dst].index)
        # Only where a parameter begins: `WeightReceiver` needs its segments in a row.
        starts = [i for i, bucket in enumerate(buckets) if bucket.segments[0].rows[0] == 0]
        # Spread evenly, by a rule that sender and receiver know without asking.
        first = starts[dst * len(starts) // len(self.plan.destinations)]
        return buckets[first:] + buckets[:first]

    def copies(self, dst: int, sender: int) -> list[list[Copy]]:
        """By bucket, what a sender copies to a destination."""
        return _copies(self, dst, sender)

    def ring_shape(self, dst: int) -> RingShape:
        """Shared memory of a colocated destination."""
        senders = self.plan.senders_to(dst)
        place = self.plan.destinations[dst]
        readers = [f"engine {engine} rank {place.index}" for engine in place.engines]
        return RingShape(
            name=f"{self.name}-{dst}",
            senders=tuple(f"training rank {rank}" for rank in senders),
            readers=tuple(readers) if self.target == "engines" else ("the driver",),
            # The table is a rectangle, so the sender with most copies sets its width.
            rows=max(sum(map(len, self.copies(dst, sender))) for sender in senders),
            slot_bytes=max(bucket.num_bytes for bucket in self.buckets(dst)),
            # The driver, which reads exports, uses no GPU.
            on_gpu=self.weights_on_gpu and self.target == "engines",
            digest=_digest(self),
        )

    def destination_of(self, engine: int, index: int) -> int:
        """Where an engine's tensor-parallel rank reads."""
        return next(
            d.number for d in self.plan.destinations if engine in d.engines and d.index == index
        )

    def owner(self, dst: int) -> int:
        """The training rank that makes a colocated destination's shared memory.

        It is the first on its device.
        """
        device = self.plan.destinations[dst].device
        assert device is not None, "a destination without a device has no shared memory"
        return min(self.plan.sites.ranks_on(device))

    @property
    def needs_messages(self) -> bool:
        """Whether any rank sends to a destination whose shared memory it cannot reach."""
        for place in self.plan.destinations:
            senders = self.plan.senders_to(place.number)
            if not all(self.is_near(rank, place.number) for rank in senders):
                return True
        return False

    @property
    def message_ranks(self) -> tuple[str, ...]:
        """The processes that send and receive messages, by rank.

        Training ranks come first, then engine ranks on dedicated devices.
        """
        names = [f"training rank {rank}" for rank in range(self.layout.world_size)]
        # All destinations or none, so `world_size` + a destination's number is its rank here.
        apart = [d for d in self.plan.destinations if d.device is None]
        return (*names, *(f"engine {d.engines[0]} rank {d.index}" for d in apart))

    def is_near(self, rank: int, dst: int) -> bool:
        """Whether a training rank shares a destination's device, and so its shared memory."""
        return self.plan.sites.device_of_rank[rank] == self.plan.destinations[dst].device


def sync_setup(
    rollout: RolloutConfig,
    spec: ModelSpec,
    layout: ParallelLayout,
    platform: Platform,
    name: str,
    node_of_rank: Sequence[int],
) -> SyncSetup:
    """What the processes of a run agree on; nodes are numbered from 0 in the order of ranks."""
    one_each = platform.one_device_a_rank
    return SyncSetup(
        name=name,
        spec=spec,
        layout=layout,
        style=platform.spec_style,
        # On CPU the ranks of a host share memory at no cost, so the host is the device.
        sites=Sites.one_each(node_of_rank) if one_each else Sites.hosts(node_of_rank),
        dtype=rollout.dtype,
        bucket_bytes=(rollout.sync_bucket_mib or platform.sync_bucket_mib) << 20,
        timeout_s=rollout.sync_timeout_s,
        engines=rollout.engines,
        tensor_parallel_size=rollout.tensor_parallel_size,
        expert_parallel=rollout.expert_parallel,
        colocated=rollout.placement == "colocated",
        backend=platform.dist_backend,
        weights_on_gpu=platform.weights_on_gpu,
    )


@cache
def _plan(setup: SyncSetup) -> ReshardPlan:
    if setup.target == "export":
        return plan_export(setup.spec, setup.layout, setup.sites, setup.style, setup.reader_beside)
    return plan_sync(
        setup.spec,
        setup.layout,
        setup.sites,
        setup.engines,
        setup.tensor_parallel_size,
        colocated=setup.colocated,
        expert_parallel=setup.expert_parallel,
        style=setup.style,
    )


@cache
def _buckets(setup: SyncSetup, index: int) -> tuple[Bucket, ...]:
    return plan_buckets(setup.plan.engine_tables[index], setup.item_bytes, setup.bucket_bytes)


@cache
def _copies(setup: SyncSetup, dst: int, sender: int) -> list[list[Copy]]:
    return copies_to(setup.plan, dst, sender, setup.buckets(dst))


@cache
def _digest(setup: SyncSetup) -> int:
    """63 bits that identify what was derived, not only what it was derived from."""
    plan = setup.plan
    buckets = [_buckets(setup, index) for index in range(len(plan.engine_tables))]
    # Tuples of numbers and names: equal values have equal text in every process, unlike hash().
    text = repr((setup, plan.destinations, plan.shares, buckets))
    # The ring holds it as int64: one bit less, so that it is never negative.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _aligned(offset: int) -> int:
    return round_up(offset, ALIGNMENT_BYTES)
