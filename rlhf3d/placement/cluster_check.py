"""The nodes of a run before any model is loaded: one probe a node, in the place of the node's first rank.

Invariant: every problem of every node is told at once; each wait has a deadline; a run that stays on the driver's own
node is not checked at all (`rlhf3d.preflight` has done that).
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from rlhf3d.config.load import ConfigError
from rlhf3d.config.schema import ClusterConfig, Config
from rlhf3d.models.spec import load_spec
from rlhf3d.observability.tables import View
from rlhf3d.parallel.meeting import host_meeting, open_meeting
from rlhf3d.placement.cluster import node_name, ray_cluster, use_node_interface
from rlhf3d.placement.node_report import NodeReport, Wanted, compare, look, written_by
from rlhf3d.placement.waiting import WorkerFailure, gather
from rlhf3d.preflight import checkpoints_gib, plan_here

CONNECT_S = 5.0
ALL_REDUCE_S = 60.0
ALL_REDUCE_ELEMENTS = 1 << 20


class Probe:
    """Ray actor of one node."""

    def look(self, wanted: Wanted, name: str, gpus_told: int) -> NodeReport:
        """See `node_report.look`."""
        return look(wanted, name, gpus_told)

    def listen(self) -> tuple[str, int]:
        """Open a port, as ranks do for each other; its address."""
        return ray.util.get_node_ip_address(), open_meeting()

    def connect(self, places: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """By node that cannot be reached from here: why."""
        failures = {}
        for name, place in places.items():
            try:
                socket.create_connection(place, timeout=CONNECT_S).close()
            except OSError as error:
                failures[name] = f"port {place[1]} of {place[0]}: {error}"
        return failures

    def meeting_place(self) -> tuple[str, int]:
        """Where the probes can meet; asked of the first."""
        return ray.util.get_node_ip_address(), open_meeting()

    def all_reduce(self, rank: int, world_size: int, meeting: tuple[str, int]) -> float:
        """Sum a tensor over all probes, by NCCL where this one has a GPU and else by gloo; seconds."""
        use_node_interface()
        from datetime import timedelta

        import torch
        from torch import distributed as dist

        timeout = timedelta(seconds=ALL_REDUCE_S)
        host_meeting(meeting[1], ALL_REDUCE_S)
        store = dist.TCPStore(
            *meeting, world_size, is_master=rank == 0, timeout=timeout, multi_tenant=True
        )
        on_gpu = bool(ray.get_gpu_ids())
        group: Any = (
            dist.ProcessGroupNCCL(store, rank, world_size)
            if on_gpu
            else dist.ProcessGroupGloo(store, rank, world_size, timeout)
        )
        tensor = torch.ones(ALL_REDUCE_ELEMENTS, device="cuda" if on_gpu else "cpu")
        group.allreduce([tensor]).wait(timeout)  # makes the connections
        start = time.monotonic()
        group.allreduce([tensor]).wait(timeout)
        total = float(tensor[-1])
        if total != world_size**2:
            raise RuntimeError(
                f"the sum of ones, twice over {world_size} nodes, came out as {total}"
            )
        return time.monotonic() - start


@dataclass(frozen=True)
class Checked:
    """What the probes found."""

    reports: list[NodeReport]
    problems: list[str]
    """Each with node, value and remedy."""
    all_reduce_s: float | None
    """None with one node, or where ports or versions are wrong already."""


def check_cluster(config: Config, reserved: PlacementGroup) -> None:
    """Check every node on which bundles are reserved. Raises ConfigError with all problems."""
    table = placement_group_table(reserved)
    bundle_of: dict[str, int] = {}
    for bundle, node in sorted(table["bundles_to_node_id"].items()):
        bundle_of.setdefault(node, bundle)
    if set(bundle_of) == {ray.get_runtime_context().get_node_id()}:
        return
    places = {}
    for node, bundle in bundle_of.items():
        resources = table["bundles"][bundle]
        strategy = PlacementGroupSchedulingStrategy(reserved, bundle)
        places[node] = {
            "scheduling_strategy": strategy,
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
        }
    on_gpu, spec = "GPU" in table["bundles"][0], load_spec(config.model.path)
    wanted = Wanted(
        files=_files(config),
        disk_gib=checkpoints_gib(plan_here(config, spec, on_gpu)),
        gpus=config.cluster.gpus_per_node if on_gpu else 0,
    )
    with _canary(config.trainer.output_dir, wanted) as wanted:
        checked = probe(places, wanted, config.cluster.startup_timeout_s)
    problems = checked.problems
    for report in checked.reports:
        if report.gpus:
            smallest = min(report.gpus, key=lambda gpu: gpu[1])
            found = plan_here(config, spec, True, smallest).memory.problems
            # What a host has is not in the report.
            problems += [
                f"node {report.name}: {text}"
                for text in found
                if not text.startswith("host memory")
            ]
    if problems:
        raise ConfigError(problems, "The cluster cannot run this as it stands")
    kind, shares = ("GPU" if on_gpu else "CPU"), dict.fromkeys(bundle_of, 0.0)
    for bundle, node in table["bundles_to_node_id"].items():
        shares[node] += table["bundles"][bundle][kind]
    named = zip(shares.values(), checked.reports, strict=True)
    text = ", ".join(f"{report.name}: {count:g} {kind}" for count, report in named)
    logging.getLogger(__name__).info(
        "checked %s; all-reduce of 4 MiB in %.4f s", text, checked.all_reduce_s or 0.0
    )


def diagnose_cluster(address: str, timeout_s: float = 120.0) -> Checked:
    """Join a cluster and check every node of it, without a run."""
    with ray_cluster(ClusterConfig(ray_address=address, startup_timeout_s=timeout_s), local_cpus=0):
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        here = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
        return probe(
            {n: {"scheduling_strategy": at, "num_cpus": 0} for n, at in here.items()},
            Wanted(),
            timeout_s,
        )


def cluster_view(checked: Checked) -> View:
    """Return what `diagnose_cluster` found."""
    lines = [_node_line(report) for report in checked.reports]
    if checked.all_reduce_s is not None:
        nodes = len(checked.reports)
        lines.append(
            f"all-reduce of 4 MiB by gloo over {nodes} nodes: {checked.all_reduce_s:.4f} s"
        )
    lines += ["", "these nodes cannot run one job" if checked.problems else "all is well"]
    return View([*lines, *(f"  - {problem}" for problem in checked.problems)], asdict(checked))


def _node_line(report: NodeReport) -> str:
    gpus = ", ".join(name for name, _ in report.gpus or ()) or "no GPU"
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    return f"node {report.name}: {gpus}; {versions}"


def probe(places: Mapping[str, Mapping[str, Any]], wanted: Wanted, timeout_s: float) -> Checked:
    """Start a probe on each node (Ray actor options by node) and let it look around; the probes are gone afterwards.

    Raises WorkerFailure that names the node on which a probe does not start or answer.
    """
    listed = {node["NodeID"]: node for node in ray.nodes()}
    names = _names({node: node_name(listed[node]) for node in places})
    told = {node: int(listed[node]["Resources"].get("GPU", 0)) for node in places}
    actors = {
        node: ray.remote(Probe).options(**options).remote() for node, options in places.items()
    }
    try:
        looks = {
            f"node {names[node]}": actor.look.remote(wanted, names[node], told[node])
            for node, actor in actors.items()
        }
        reports: list[NodeReport] = gather("cluster check", looks, timeout_s)
        driver = look(replace(wanted, folder=None), "of the driver", 0)
        problems = compare(reports, driver, wanted)
        if wanted.folder is not None:
            problems += _lost_files(reports, wanted)
        probes = {names[node]: actor for node, actor in actors.items()}
        all_reduce_s = None
        if len(probes) > 1:
            unreachable = _check_ports(probes)
            problems += unreachable
            if not unreachable and len({report.versions.get("torch") for report in reports}) == 1:
                all_reduce_s, failed = _check_all_reduce(probes)
                problems += failed
        return Checked(reports, problems, all_reduce_s)
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _names(named: Mapping[str, str]) -> dict[str, str]:
    """By node: its name, with its number where Ray has several on one host."""
    several = {name for name in named.values() if list(named.values()).count(name) > 1}
    return {node: f"{name} {node[:8]}" if name in several else name for node, name in named.items()}


def _check_ports(probes: Mapping[str, Any]) -> list[str]:
    """Whether each node reaches a fresh port of each other."""
    opened = gather(
        "cluster check (ports)",
        {f"node {n}": p.listen.remote() for n, p in probes.items()},
        CONNECT_S * 4,
    )
    places = dict(zip(probes, opened, strict=True))
    calls = {
        f"node {name}": probe.connect.remote(
            {other: at for other, at in places.items() if other != name}
        )
        for name, probe in probes.items()
    }
    failures = gather("cluster check (ports)", calls, CONNECT_S * (len(probes) + 4))
    return [
        f"node {name} does not reach node {other}, {why}: open all ports between the nodes, or start Ray with "
        "--node-ip-address of the network that they share"
        for name, failed in zip(probes, failures, strict=True)
        for other, why in failed.items()
    ]


def _check_all_reduce(probes: Mapping[str, Any]) -> tuple[float | None, list[str]]:
    first = next(iter(probes))
    (meeting,) = gather(
        "cluster check", {f"node {first}": probes[first].meeting_place.remote()}, CONNECT_S * 4
    )
    calls = {
        f"node {name}": probe.all_reduce.remote(rank, len(probes), meeting)
        for rank, (name, probe) in enumerate(probes.items())
    }
    try:
        return max(gather("cluster check (all-reduce)", calls, 2 * ALL_REDUCE_S)), []
    except WorkerFailure as error:
        return None, [
            f"{error}\n    one process a node cannot sum a tensor: name the nodes' network by GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME (rlhf3d launch --env); NCCL_DEBUG=INFO tells what NCCL tries"
        ]


def _files(config: Config) -> dict[str, int]:
    """Sizes of the files that the configuration names, by path."""
    folders = [
        Path(folder)
        for folder in (config.model.path, config.reward_model.path)
        if folder is not None
    ]
    paths = [str(path) for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    own = (config.custom_reward_function.path, config.algorithm.custom_path)
    paths += [*config.data.train_files, *config.data.val_files, *filter(None, own)]
    return {path: Path(path).stat().st_size for path in paths}


@contextmanager
def _canary(folder: str, wanted: Wanted) -> Iterator[Wanted]:
    """A file with a token in the run's folder, which every node must see, and beside which it must write."""
    wanted = replace(
        wanted,
        folder=folder,
        canary=f".cluster-check-{secrets.token_hex(4)}",
        token=secrets.token_hex(8),
    )
    (Path(folder) / wanted.canary).write_text(wanted.token)
    try:
        yield wanted
    finally:
        for left in Path(folder).glob(f"{wanted.canary}*"):
            left.unlink()


def _lost_files(reports: list[NodeReport], wanted: Wanted) -> list[str]:
    """What nodes wrote and the driver does not see: they wrote to a folder of their own."""
    return [
        f"node {report.name}: the driver does not see what it writes to trainer.output_dir = {wanted.folder}: it must "
        "be on a file system that all nodes share"
        for report in reports
        if report.token == wanted.token
        and report.writable is None
        and not written_by(wanted, report.name).is_file()
    ]
