"""Weights between real processes: engines on devices of their own, and hosts that share no memory.

Proven: sync after sync every engine rank gets exactly its share of the newest weights, by messages
alone (gloo) and by messages that the owners of shared memory pass on; a process that is gone or
silent ends every wait on it in time, in an error that names it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.weights import LLAMA, QWEN2, QWEN3_MOE, Params, cut, numbered_tensors, rank_params

from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.resharding.messages import Group, Post
from rlhf3d.resharding.receiving import Inbox, MessageInbox, RingInbox, WeightReceiver
from rlhf3d.resharding.ring import SyncError
from rlhf3d.resharding.sending import WeightSender
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.resharding.sites import Sites

VERSIONS = [0, 3, 4]
TIMEOUT_S = 60.0
SHORT_S = 6.0
"""Deadline where something is missing on purpose."""

APART = SyncSetup(
    name="",
    spec=LLAMA,
    layout=ParallelLayout(tp=2, pp=2),
    style="local",
    sites=Sites.hosts([0, 0, 0, 0]),
    dtype="bfloat16",
    bucket_bytes=1200,
    timeout_s=TIMEOUT_S,
    tensor_parallel_size=2,
    colocated=False,
)
"""Four training ranks and one engine of two ranks that shares no device with them."""
TWO_HOSTS = replace(
    APART,
    sites=Sites.hosts([0, 0, 1, 1]),
    dtype="float32",
    engines=2,
    tensor_parallel_size=1,
    colocated=True,
)
"""Each host has one pipeline stage and one engine.

Half of what an engine needs is on the other host.
"""


class FullMessages(Group):
    """A group that has no use for messages without bytes."""

    def exchange(self, sends: Sequence[Post], receives: Sequence[Post]) -> list[Any]:
        assert all(message.numel() for message, _ in [*sends, *receives])
        return super().exchange(sends, receives)


def make_group(setup: SyncSetup, rank: int, port: int) -> Group:
    return FullMessages(setup.backend, rank, setup.message_ranks, "127.0.0.1", port, TIMEOUT_S)


def weights(setup: SyncSetup, rank: int, version: int = 0) -> Params:
    return rank_params(numbered_tensors(setup.spec, version), setup.spec, setup.layout, rank)


def train_and_send(setup: SyncSetup, rank: int, sender: WeightSender, params: Params) -> int:
    """All syncs of one training rank; bytes sent in each."""
    sent = set()
    for sync, version in enumerate(VERSIONS):
        for key, weight in weights(setup, rank, version).items():
            params[key].copy_(weight)
        sent.add(sender.send(version, sync).sent_bytes)
    (every_time,) = sent
    return every_time


def receive_and_compare(setup: SyncSetup, dst: int, inbox: Inbox) -> int:
    """All syncs of one engine rank; number of parameters."""
    receiver, dtype = WeightReceiver(setup, dst, inbox), getattr(torch, setup.dtype)
    for sync, version in enumerate(VERSIONS):
        wanted = cut(numbered_tensors(setup.spec, version), receiver.table)
        got = {
            param.name: tensor.clone() for param, tensor in receiver.stream_params(version, sync)
        }
        assert set(got) == set(wanted)
        for name, weight in wanted.items():
            assert torch.equal(got[name], weight.to(dtype)), f"{name} of version {version}"
    return len(wanted)


def rank_apart(rank: int, port: int, setup: SyncSetup) -> int:
    group, world = make_group(setup, rank, port), setup.layout.world_size
    if rank >= world:
        return receive_and_compare(
            setup, rank - world, MessageInbox(setup, rank - world, group, torch.device("cpu"))
        )
    params = weights(setup, rank)
    sender = WeightSender(setup, rank, params)
    sender.open(group)
    return train_and_send(setup, rank, sender, params)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bucket_bytes": 1 << 20, "dtype": "float32", "layout": ParallelLayout(pp=2, cp=2)},
        {
            "spec": replace(QWEN2, hidden_size=7),
            "layout": ParallelLayout(tp=2, dp=2),
            "backend": "nccl_rules",
        },
        {
            "spec": QWEN3_MOE,
            "layout": ParallelLayout(tp=2, dp=2, ep=4),
            "bucket_bytes": 3000,
            "expert_parallel": True,
        },
    ],
    ids=["stages", "replicas, one bucket", "biases, unaligned", "experts"],
)
def test_engines_apart_get_the_weights_by_messages(changes: dict[str, Any]) -> None:
    setup = replace(APART, name=f"test-{os.getpid()}", **changes)
    assert setup.needs_messages and len(setup.message_ranks) == 6
    results = run_ranks(6, rank_apart, setup, timeout_s=TIMEOUT_S)
    assert sum(results[:4]) == sum(setup.plan.traffic.received) * setup.item_bytes
    assert results[4] == results[5] > 0


def rank_on_two_hosts(rank: int, port: int, setup: SyncSetup, step: Barrier) -> int:
    """Training ranks 0 to 3, then one process for each engine rank, as the driver starts them."""
    world = setup.layout.world_size
    if rank >= world:
        step.wait(TIMEOUT_S)  # the shared memory is made
        engine, index = divmod(rank - world, setup.tensor_parallel_size)
        dst = setup.destination_of(engine, index)
        inbox = RingInbox(setup, dst, setup.plan.destinations[dst].engines.index(engine))
        step.wait(TIMEOUT_S)  # opened
        return receive_and_compare(setup, dst, inbox)
    params = weights(setup, rank)
    sender = WeightSender(setup, rank, params)
    step.wait(TIMEOUT_S)
    sender.open(make_group(setup, rank, port))
    step.wait(TIMEOUT_S)
    sender.seal()
    return train_and_send(setup, rank, sender, params)


@pytest.fixture
def two_hosts() -> Iterator[SyncSetup]:
    """A name of its own, and no file left whatever happens."""
    setup = replace(TWO_HOSTS, name=f"test-{os.getpid()}-hosts")
    yield setup
    for place in setup.plan.destinations:
        setup.ring_shape(place.number).path().unlink(missing_ok=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engines": 1, "tensor_parallel_size": 4, "dtype": "bfloat16"},
        {"sites": Sites.gpus(4, 4), "engines": 4, "backend": "nccl_rules"},
        {
            "sites": Sites.gpus(4, 4),
            "engines": 2,
            "tensor_parallel_size": 2,
            "backend": "nccl_rules",
        },
        {"spec": QWEN3_MOE, "layout": ParallelLayout(tp=2, dp=2, ep=4), "bucket_bytes": 3000},
        {
            "engines": 3,
            "bucket_bytes": 1 << 20,
            "layout": ParallelLayout(tp=4),
            "sites": Sites.hosts([0, 1, 0, 1]),
        },
    ],
    ids=[
        "an engine on each host",
        "more ranks than key-value heads",
        "four GPUs, an engine on each",
        "four GPUs, two engines",
        "experts",
        "two engines share, one bucket",
    ],
)
def test_owners_pass_on_what_comes_from_another_host(
    two_hosts: SyncSetup, changes: dict[str, Any]
) -> None:
    setup = replace(two_hosts, **changes)
    processes = 4 + setup.engines * setup.tensor_parallel_size
    assert setup.needs_messages and sum(setup.plan.traffic.received) > 0
    step = multiprocessing.get_context("fork").Barrier(processes)
    results = run_ranks(processes, rank_on_two_hosts, setup, step, timeout_s=TIMEOUT_S)
    assert sum(results[:4]) == sum(setup.plan.traffic.needed) * setup.item_bytes
    assert not any(
        setup.ring_shape(place.number).path().exists() for place in setup.plan.destinations
    )


def outcome(work: Any, *args: Any) -> tuple[str, float]:
    """The SyncError that a call ends in and the seconds until it did.

    Empty text where it succeeds.
    """
    start = time.monotonic()
    try:
        work(*args)
    except SyncError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


def rank_apart_with_a_loss(
    rank: int, port: int, setup: SyncSetup, lost: int, gone: bool, synced: Barrier, end: Barrier
) -> Any:
    """One good sync; before the next, rank `lost` ends, or stays and does nothing."""
    group, world = make_group(setup, rank, port), setup.layout.world_size
    mine: WeightSender | WeightReceiver
    if rank < world:
        mine = WeightSender(setup, rank, weights(setup, rank))
        mine.open(group)
    else:
        mine = WeightReceiver(
            setup, rank - world, MessageInbox(setup, rank - world, group, torch.device("cpu"))
        )

    def work(version: int, sync: int) -> None:
        if isinstance(mine, WeightSender):
            mine.send(version, sync)
        else:
            list(mine.stream_params(version, sync))

    work(0, 0)
    synced.wait(TIMEOUT_S)
    mine.setup = replace(setup, timeout_s=SHORT_S)
    result = None
    if rank != lost:
        result = outcome(work, 1, 1)
        assert outcome(work, 2, 2)[0] == result[0], (
            "whoever lost a message sends and takes no others"
        )
    elif gone:
        return None
    end.wait(TIMEOUT_S)
    return result


def named(results: list[Any], ranks: list[int], text: str) -> None:
    """These ranks ended in time, in an error with this text."""
    for rank in ranks:
        error, seconds = results[rank]
        assert re.search(text, error), f"rank {rank}: {error!r}"
        assert seconds < SHORT_S + 40, f"rank {rank} took {seconds:.1f} s"


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "silent"])
@pytest.mark.parametrize("lost", [3, 5])
def test_a_lost_peer_is_named(lost: int, gone: bool) -> None:
    setup = replace(APART, name=f"test-{os.getpid()}")
    context = multiprocessing.get_context("fork")
    synced, end = context.Barrier(6), context.Barrier(5 if gone else 6)
    results = run_ranks(
        6, rank_apart_with_a_loss, setup, lost, gone, synced, end, timeout_s=2 * TIMEOUT_S
    )
    how = ": .*[Cc]onnection" if gone else r" did not end in time; raise rollout\.sync_timeout_s"
    if lost == 3:
        named(results, [4, 5], rf"^sync_weights: a message from training rank 3{how}")
    else:
        named(results, [0, 1, 2, 3], rf"^sync_weights: a message to engine 0 rank 1{how}")


def rank_on_two_hosts_with_a_loss(
    rank: int, port: int, setup: SyncSetup, step: Barrier, end: Barrier
) -> Any:
    """Training rank 3, on host 1, ends before it sends anything."""
    if rank >= 4:
        step.wait(TIMEOUT_S)
        receiver = WeightReceiver(setup, rank - 4, RingInbox(setup, rank - 4))
        step.wait(TIMEOUT_S)
        result = outcome(list, receiver.stream_params(0, 0))
    else:
        sender = WeightSender(setup, rank, weights(setup, rank))
        step.wait(TIMEOUT_S)
        sender.open(make_group(setup, rank, port))
        step.wait(TIMEOUT_S)
        if rank == 3:
            return None
        result = outcome(sender.send, 0, 0)
    end.wait(TIMEOUT_S)
    return result


def test_a_lost_sender_on_another_host_is_named(two_hosts: SyncSetup) -> None:
    setup = replace(
        two_hosts, timeout_s=SHORT_S, bucket_bytes=1 << 20
    )  # one bucket: all wait for all
    context = multiprocessing.get_context("fork")
    results = run_ranks(
        6, rank_on_two_hosts_with_a_loss, setup, context.Barrier(6), context.Barrier(5)
    )
    named(results, [0], r"^sync_weights: a message from training rank 3")
    named(results, [4, 5], r"^sync_weights: bucket \d+ was not filled in time by .*training rank 3")


def rank_with_a_fault(rank: int, port: int, setup: SyncSetup, fault: str, step: Barrier) -> str:
    """Rank 2 sends an older version than the others, or its messages change on the way."""
    world = setup.layout.world_size
    if rank < world:
        sender = WeightSender(setup, rank, weights(setup, rank))
        step.wait(TIMEOUT_S)
        sender.open(make_group(setup, rank, port))
        step.wait(TIMEOUT_S)
        if rank == 2 and fault == "changed":
            (outbox,) = (far for far in sender._far if setup.colocated or far.peer == world)
            fill = outbox.fill

            def flip(*args: Any) -> torch.Tensor:
                message = fill(*args)
                message[-16] ^= 1  # in the last block
                return message

            outbox.fill = flip  # type: ignore[assignment, method-assign]
        sender.send(7 if rank == 2 and fault == "old" else 8, 0)
        step.wait(TIMEOUT_S)
        return ""
    step.wait(TIMEOUT_S)
    dst = rank - world
    inbox: Inbox
    if setup.colocated:
        inbox = RingInbox(setup, dst)
    else:
        inbox = MessageInbox(setup, dst, make_group(setup, rank, port), torch.device("cpu"))
    step.wait(TIMEOUT_S)
    receiver = WeightReceiver(setup, dst, inbox)
    error, _ = outcome(lambda: list(receiver.stream_params(8, 0)))
    step.wait(TIMEOUT_S)
    return error


@pytest.mark.parametrize("colocated", [True, False], ids=["passed on", "apart"])
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("old", r"is of policy version 7; wanted policy version 8"),
        ("changed", "differs from what was sent for policy ver"),
    ],
)
def test_old_and_changed_messages_are_refused(
    two_hosts: SyncSetup, fault: str, problem: str, colocated: bool
) -> None:
    base = two_hosts if colocated else replace(APART, name=two_hosts.name)
    setup = replace(
        base, bucket_bytes=1 << 20
    )  # one bucket: no sender waits for a reader that has given up
    step = multiprocessing.get_context("fork").Barrier(6)
    errors = run_ranks(6, rank_with_a_fault, setup, fault, step, timeout_s=TIMEOUT_S)
    first = r"^sync_weights: model\.\S+\[.*\] from training rank 2 "
    assert re.search(first + problem, errors[4]), errors[4]
    if fault == "changed":
        assert errors[5] == "", "only the first engine rank's message was changed"
