"""Ray for one run: started here or joined by address, and left when the run ends.

Invariant: when `ray_cluster` exits, however it exits, no process that the run started is left.
Runs in: driver.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil
import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf3d.config.schema import ClusterConfig
from rlhf3d.machine import cores
from rlhf3d.placement.calls import Reply
from rlhf3d.placement.ray_here import RayHere
from rlhf3d.placement.resources import Placement
from rlhf3d.placement.waiting import WorkerFailure, exit_on_timeout, gather, ray_ended

LOSS_S = 90.0
"""Seconds after which Ray has given up a lost node: 5 health checks of up to 10 s, 3 s apart."""


@contextmanager
def ray_cluster(
    config: ClusterConfig,
    local_cpus: int,
    on_sigterm: Callable[[int, FrameType | None], None] | None = None,
    local_gpus: int | None = None,
    batch_bytes: int = 0,
) -> Iterator[None]:
    """Run a block with a Ray session.

    Where it is started here, it has `local_cpus` logical CPUs, `local_gpus` GPUs (None: those it
    finds) and room for two batches of `batch_bytes` between processes. SIGTERM without a handler
    acts as Ctrl-C.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts a process for each CPU, and by itself ends those that have become no actor within a
    # second, to start others when they do.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    handler = on_sigterm or _interrupt
    # Before Ray starts, whose own handler takes its place.
    previous = signal.getsignal(signal.SIGTERM)
    own = RayHere()
    try:
        try:
            if config.ray_address is None:
                own.start(local_cpus, local_gpus, config.startup_timeout_s, batch_bytes)
            else:
                join(config.ray_address, config.startup_timeout_s)
                wait_for_nodes(config.num_nodes, config.startup_timeout_s)
        except SystemExit:  # from the handler of SIGTERM that ray.init sets
            handler(signal.SIGTERM, None)
            raise
        except SystemError as error:
            _raise_swallowed(error)
            raise
        # ray.init sets a handler of its own.
        signal.signal(signal.SIGTERM, handler)
        # A cluster that is joined may have lost nodes long before this run.
        lost_before = set(_lost_nodes())
        try:
            yield
        except Exception as error:
            _raise_swallowed(error)
            # Asked first: when Ray's processes end, all else that fails follows from it.
            if why := own.ended():
                raise WorkerFailure(why) from None
            if not isinstance(error, WorkerFailure):
                raise
            # Only then is it worth waiting until Ray's health checks give a node up.
            may_be_lost = error.lost_touch and config.num_nodes > 1
            lost = _wait_for_loss(lost_before, LOSS_S if may_be_lost else 0.0)
            if not lost:
                raise
            text = f"{'; '.join(lost)}; the same command continues when it is back\n{error}"
            raise WorkerFailure(text) from None
    finally:
        # The old handler comes last: by default SIGTERM would end this process with Ray half ended.
        own.end()
        signal.signal(signal.SIGTERM, previous)


def _raise_swallowed(error: Exception) -> None:
    """Raise what a signal's handler raised inside one of Ray's calls, which wraps it."""
    if isinstance(error, SystemError) and isinstance(error.__cause__, BaseException):
        raise error.__cause__


def join(address: str, timeout_s: float) -> None:
    """Connect to a running cluster. Raises ValueError when there is none."""
    try:
        with exit_on_timeout(
            f"connect to Ray at {address}: its head there does not serve this driver", timeout_s
        ):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, AuthenticationError) as error:
        raise ValueError(
            f"cluster.ray_address = {address}: no Ray cluster answers there ({error}); start one "
            "with `ray start --head` on this machine (rlhf3d launch writes job files that do), or "
            "set it to null. Where a token exists (~/.ray/auth_token), Ray's head requires it of "
            "everybody: RAY_AUTH_MODE=token for every process of every node, this one too"
        ) from None


def wait_for_nodes(count: int, timeout_s: float) -> None:
    """Wait until the cluster has `count` nodes. Raises ValueError that names those it has."""
    deadline = time.monotonic() + timeout_s
    while len(nodes := _live_nodes()) < count:
        if time.monotonic() > deadline:
            raise ValueError(
                f"cluster.num_nodes = {count}, but after {timeout_s:.0f} s "
                f"(cluster.startup_timeout_s) the Ray cluster has {len(nodes)}: "
                f"{', '.join(map(node_name, nodes))}; look into the other nodes' Ray logs, or ask "
                "for fewer nodes"
            )
        time.sleep(0.5)


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def node_name(node: dict[str, Any]) -> str:
    """Return host and address of a node that Ray lists."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _lost_nodes() -> dict[str, str]:
    """The nodes that the cluster has lost, by id: which and why."""
    lost = [node for node in ray.nodes() if not node["Alive"]]
    return {
        node["NodeID"]: f"node {node_name(node)} was lost ({node['DeathReasonMessage']})"
        for node in lost
    }


def _wait_for_loss(known: set[str], timeout_s: float) -> list[str]:
    """What Ray says of nodes that it has lost, except `known` ones; noticing takes it a while."""
    deadline = time.monotonic() + timeout_s
    while True:
        lost = [text for node, text in _lost_nodes().items() if node not in known]
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(0.5)


def use_node_interface() -> None:
    """Have gloo use the network interface at which Ray knows this node.

    By itself gloo looks up the host's own name, which often is a loopback address that no other
    node reaches.
    """
    own_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if own_address in [address.address for address in addresses]:
            # setdefault: the user's own choice stands.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@contextmanager
def reserve(placement: Placement, timeout_s: float) -> Iterator[PlacementGroup]:
    """Reserve the bundles of a placement. Raises ValueError when the cluster cannot hold them."""
    group = placement_group(placement.bundles, strategy=placement.strategy)
    try:
        # A group that the cluster cannot hold stays pending: the deadline alone shows it.
        if not group.wait(timeout_s):
            offers = [f"{node_name(node)}: {_offer(node)}" for node in _live_nodes()]
            raise ValueError(
                f"the run needs {_needs(placement)}, but after {timeout_s:.0f} s "
                "(cluster.startup_timeout_s) the Ray cluster does not offer it; it has "
                f"{'; '.join(offers)}, of which others may use some; make the layouts smaller, add "
                "nodes, or give Ray more CPUs (`ray start --num-cpus`)"
            )
        yield group
    finally:
        if not ray_ended():  # a call would otherwise wait for what is gone
            remove_placement_group(group)


def _needs(placement: Placement) -> str:
    """Bundles as text: `2 x (1 GPU, 2 CPU) and 1 x (4 GPU, 4 CPU)`."""
    counts: Counter[str] = Counter()
    for bundle in placement.bundles:
        counts[", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())] += 1
    text = " and ".join(f"{count} x ({bundle})" for bundle, count in counts.items())
    spread = placement.strategy == "STRICT_SPREAD"
    return f"{text}, each on a node of its own" if spread else text


def _offer(node: dict[str, Any]) -> str:
    resources = node["Resources"]
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU"))


def nodes_of(group: PlacementGroup) -> list[int]:
    """Return the node of each bundle, numbered in the order in which bundles first name them."""
    of_bundles = _node_ids(group)
    numbers = {node: number for number, node in enumerate(dict.fromkeys(of_bundles))}
    return [numbers[node] for node in of_bundles]


def _node_ids(group: PlacementGroup) -> list[str]:
    """Ray's id of the node of each bundle."""
    ids = placement_group_table(group)["bundles_to_node_id"]
    return [ids[bundle] for bundle in range(len(ids))]


def has_its_nodes(group: PlacementGroup) -> bool:
    """Whether Ray knows of no loss of a node that has bundles of the group."""
    alive = {node["NodeID"] for node in _live_nodes()}
    return set(_node_ids(group)) <= alive


def cores_of(group: PlacementGroup, timeout_s: float) -> list[int]:
    """Return the CPU cores that processes may use on each node, by its number in `nodes_of`.

    Ray's own number of CPUs is whatever it was started with, not what the node has.
    """
    nodes = dict.fromkeys(_node_ids(group))
    # No task where none is needed: it would start one more worker process.
    if set(nodes) == {ray.get_runtime_context().get_node_id()}:
        return [cores()]
    calls: dict[str, Reply[int]] = {}
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        # num_cpus=0: the bundles may hold every CPU that Ray has, and the task would wait for one.
        task = ray.remote(cores).options(num_cpus=0, scheduling_strategy=on_node)
        calls[f"node {node[:8]}"] = task.remote()
    return gather("count cores", calls, timeout_s)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
