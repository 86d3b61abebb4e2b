"""Ray for one run: started here or joined by address, and gone when the run ends.

Invariant: when `ray_cluster` exits, however it exits, no process that the run started is left.
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
from rlhf3d.placement.ray_here import RayHere
from rlhf3d.placement.resources import Placement
from rlhf3d.placement.waiting import WorkerFailure, bounded, gather, ray_ended

LOSS_S = 90.0
"""Ray gives a node up after 5 health checks of up to 10 s, 3 s apart."""


@contextmanager
def ray_cluster(
    config: ClusterConfig,
    local_cpus: int,
    on_sigterm: Callable[[int, FrameType | None], None] | None = None,
    local_gpus: int | None = None,
    batch_bytes: int = 0,
) -> Iterator[None]:
    """A Ray session; when it is started here, of `local_cpus` logical CPUs and `local_gpus` GPUs (None: those it
    finds), with room for two batches of `batch_bytes` between processes. SIGTERM without a handler is as Ctrl-C."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    heard = on_sigterm or _interrupt
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
            heard(signal.SIGTERM, None)
            raise
        except SystemError as error:
            _raise_swallowed(error)
            raise
        signal.signal(signal.SIGTERM, heard)
        gone = set(_lost_nodes())
        try:
            yield
        except Exception as error:
            _raise_swallowed(error)
            if why := own.ended():
                raise WorkerFailure(why) from None
            lost_touch = (
                isinstance(error, WorkerFailure) and error.lost_touch and config.num_nodes > 1
            )
            if isinstance(error, WorkerFailure) and (
                lost := _wait_for_loss(gone, LOSS_S if lost_touch else 0.0)
            ):
                text = f"{'; '.join(lost)}; the same command goes on when it is back\n{error}"
                raise WorkerFailure(text) from None
            raise
    finally:
        own.end()
        signal.signal(signal.SIGTERM, previous)


def _raise_swallowed(error: Exception) -> None:
    """What a signal's handler raised inside one of Ray's calls, which may return a result all the same."""
    if isinstance(error, SystemError) and isinstance(error.__cause__, BaseException):
        raise error.__cause__


def join(address: str, timeout_s: float) -> None:
    """Connect to a running cluster. Raises ValueError when there is none."""
    try:
        with bounded(
            f"connect to Ray at {address}: its head there does not serve this driver", timeout_s
        ):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, AuthenticationError) as error:
        raise ValueError(
            f"cluster.ray_address = {address}: no Ray cluster answers there ({error}); start one with `ray start "
            "--head` on this machine (rlhf3d launch writes job files that do), or set it to null. Where a token "
            "exists (~/.ray/auth_token), Ray's head wants it of everybody: RAY_AUTH_MODE=token for every process of "
            "every node, this one too"
        ) from None


def wait_for_nodes(count: int, timeout_s: float) -> None:
    """Wait until the cluster has `count` nodes. Raises ValueError that names those it has."""
    deadline = time.monotonic() + timeout_s
    while len(there := [node for node in ray.nodes() if node["Alive"]]) < count:
        if time.monotonic() > deadline:
            raise ValueError(
                f"cluster.num_nodes = {count}, but after {timeout_s:.0f} s (cluster.startup_timeout_s) the Ray cluster "
                f"has {len(there)}: {', '.join(map(node_name, there))}; look into the other nodes' Ray logs, or ask "
                "for fewer nodes"
            )
        time.sleep(0.5)


def node_name(node: dict[str, Any]) -> str:
    """Host and address of a node that Ray lists."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _lost_nodes() -> dict[str, str]:
    """Nodes that the cluster has had and that are gone: by id, who and why."""
    lost = [node for node in ray.nodes() if not node["Alive"]]
    return {
        node["NodeID"]: f"node {node_name(node)} was lost ({node['DeathReasonMessage']})"
        for node in lost
    }


def _wait_for_loss(known: set[str], timeout_s: float) -> list[str]:
    """What Ray says of nodes that are gone, but for those it had lost before; it takes a while to notice."""
    deadline = time.monotonic() + timeout_s
    while True:
        lost = [text for node, text in _lost_nodes().items() if node not in known]
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(0.5)


def use_node_interface() -> None:
    """Have gloo talk through the interface at which Ray knows this node.

    Left alone gloo looks up the host's own name, which often is a loopback address that no other node reaches.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(at.address == address for at in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@contextmanager
def reserve(placement: Placement, timeout_s: float) -> Iterator[PlacementGroup]:
    """The bundles of a placement. Raises ValueError when the cluster cannot hold them."""
    group = placement_group(placement.bundles, strategy=placement.strategy)
    try:
        if not group.wait(timeout_s):
            wanted = Counter(
                ", ".join(f"{n:g} {kind}" for kind, n in bundle.items())
                for bundle in placement.bundles
            )
            apart = ", each on a node of its own" if placement.strategy == "STRICT_SPREAD" else ""
            nodes = [(node_name(node), node["Resources"]) for node in ray.nodes() if node["Alive"]]
            offers = [
                ", ".join(f"{has.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU"))
                for _, has in nodes
            ]
            raise ValueError(
                f"the run needs {' and '.join(f'{count} x ({text})' for text, count in wanted.items())}{apart}, but "
                f"after {timeout_s:.0f} s (cluster.startup_timeout_s) the Ray cluster does not offer it; it has "
                f"{'; '.join(f'{name}: {has}' for (name, _), has in zip(nodes, offers, strict=True))}, of which others "
                "may use some; make the layouts smaller, add nodes, or tell Ray of more CPUs (`ray start --num-cpus`)"
            )
        yield group
    finally:
        if not ray_ended():  # which nothing but its own end would answer
            remove_placement_group(group)


def nodes_of(group: PlacementGroup) -> list[int]:
    """The node of each bundle, numbered in the order in which bundles first name them."""
    names = placement_group_table(group)["bundles_to_node_id"]
    in_order = [names[bundle] for bundle in range(len(names))]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(in_order))}
    return [numbers[name] for name in in_order]


def cores_of(group: PlacementGroup, timeout_s: float) -> list[int]:
    """CPU cores that processes may use on each node of a placement group, by its number in `nodes_of`.

    Ray's own number of CPUs is what it was told, not what is there.
    """
    names = placement_group_table(group)["bundles_to_node_id"]
    nodes = dict.fromkeys(names[bundle] for bundle in range(len(names)))
    if set(nodes) == {ray.get_runtime_context().get_node_id()}:
        return [cores()]
    count = ray.remote(cores)
    calls = {
        f"node {node[:8]}": count.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for node in nodes
    }
    return gather("count cores", calls, timeout_s)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
