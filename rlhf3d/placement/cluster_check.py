"""The nodes of a run before any model is loaded: one probe per node, with a rank's resources.

Invariant: all problems of all nodes are reported together; each wait has a deadline; a run that
stays on the driver's own node is not checked here (`rlhf3d.preflight` has done that).
Runs in: driver; `Probe` on every node.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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

from rlhf3d.config.keys import code_files
from rlhf3d.config.load import ConfigError
from rlhf3d.config.schema import ClusterConfig, Config
from rlhf3d.models.spec import load_spec
from rlhf3d.observability.tables import View
from rlhf3d.parallel.meeting import host_meeting, open_meeting
from rlhf3d.placement.calls import Reply, start_call
from rlhf3d.placement.cluster import node_name, ray_cluster, use_node_interface
from rlhf3d.placement.node_report import NodeReport, Wanted, compare, look, written_by
from rlhf3d.placement.waiting import WorkerFailure, gather
from rlhf3d.planning.plan import make_plan
from rlhf3d.preflight import checkpoints_gib, cluster_here

CONNECT_S = 5.0
ALL_REDUCE_S = 60.0
# In float32: 4 MiB.
ALL_REDUCE_ELEMENTS = 1 << 20


class Probe:
    """Ray actor on one node."""

    def look(self, wanted: Wanted, name: str, ray_gpus: int) -> NodeReport:
        """See `node_report.look`."""
        return look(wanted, name, ray_gpus)

    def listen(self) -> tuple[str, int]:
        """Open a port, as ranks do for each other; return its address."""
        return ray.util.get_node_ip_address(), open_meeting()

    def connect(self, places: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """Return why nodes cannot be reached from here, by name of the node."""
        failures = {}
        for name, (address, port) in places.items():
            try:
                # Nobody accepts there: the kernel completes the connection in the listening queue.
                socket.create_connection((address, port), timeout=CONNECT_S).close()
            except OSError as error:
                failures[name] = f"port {port} of {address}: {error}"
        return failures

    def all_reduce(self, rank: int, world_size: int, meeting: tuple[str, int]) -> float:
        """Sum a tensor over all probes, which meet at the first's `meeting`; return the seconds.

        NCCL does it where this process has a GPU, otherwise gloo.
        """
        # Before the group is made: gloo reads the interface then.
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
        if on_gpu:
            group: Any = dist.ProcessGroupNCCL(store, rank, world_size)
        else:
            group = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        tensor = torch.ones(ALL_REDUCE_ELEMENTS, device="cuda" if on_gpu else "cpu")
        group.allreduce([tensor]).wait(timeout)  # makes the connections
        start = time.monotonic()
        group.allreduce([tensor]).wait(timeout)
        # Reads from the device, so the sum is there before the clock is read again.
        total = float(tensor[-1])
        # The first sum of ones gives world_size everywhere, the second world_size of those.
        if total != world_size**2:
            raise RuntimeError(
                f"the sum of ones, twice over {world_size} nodes, came out as {total}"
            )
        return time.monotonic() - start


@dataclass(frozen=True)
class ClusterReport:
    """The result of a check."""

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
    # All on the driver's node: there is nothing to compare or connect.
    if set(bundle_of) == {ray.get_runtime_context().get_node_id()}:
        return
    places = {}
    for node, bundle in bundle_of.items():
        resources = table["bundles"][bundle]
        strategy = PlacementGroupSchedulingStrategy(reserved, bundle)
        # A complete bundle, for a probe to see GPUs as a rank would; free again when it is gone.
        places[node] = {
            "scheduling_strategy": strategy,
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
        }
    on_gpu, spec = "GPU" in table["bundles"][0], load_spec(config.model.path)
    # Most code runs beside the driver, which a job that is queued again has on another node.
    files = [*config.data.train_files, *config.data.val_files, *code_files(config).values()]
    wanted = Wanted(
        files=_sizes([config.model.path, config.reward_model.path], files),
        disk_gib=checkpoints_gib(make_plan(config, spec, cluster_here(config.cluster, on_gpu))),
        gpus=config.cluster.gpus_per_node if on_gpu else 0,
    )
    with _token_file(config.trainer.output_dir, wanted) as wanted:
        checked = probe(places, wanted, config.cluster.startup_timeout_s)
    problems = checked.problems
    for report in checked.reports:
        if report.gpus:
            memory_gib = {gpu: gpu[1] for gpu in report.gpus}
            # Any rank may get this one, so the plan must hold on it.
            smallest = min(report.gpus, key=memory_gib.__getitem__)
            cluster = cluster_here(config.cluster, True, smallest)
            for text in make_plan(config, spec, cluster).memory.problems:
                # The report does not know the memory of the node's host.
                if not text.startswith("host memory"):
                    problems.append(f"node {report.name}: {text}")
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


def diagnose_cluster(address: str, timeout_s: float = 120.0) -> ClusterReport:
    """Join a cluster and check every node of it, without a run."""
    with ray_cluster(ClusterConfig(ray_address=address, startup_timeout_s=timeout_s), local_cpus=0):
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        places = {}
        for node in nodes:
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            places[node] = {"scheduling_strategy": on_node, "num_cpus": 0}
        return probe(places, Wanted(), timeout_s)


def cluster_view(checked: ClusterReport) -> View:
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


def probe(
    places: Mapping[str, Mapping[str, Any]], wanted: Wanted, timeout_s: float
) -> ClusterReport:
    """Check nodes with a probe on each; `places` are Ray actor options by node.

    The probes are gone afterwards. Raises WorkerFailure that names the node on which a probe does
    not start or answer.
    """
    listed = {node["NodeID"]: node for node in ray.nodes()}
    names = _names({node: node_name(listed[node]) for node in places})
    actors: dict[str, Any] = {}
    looks: dict[str, Reply[NodeReport]] = {}
    for node, options in places.items():
        name, ray_gpus = names[node], int(listed[node]["Resources"].get("GPU", 0))
        actors[node] = ray.remote(Probe).options(**options).remote()
        looks[f"node {name}"] = start_call(actors[node], Probe.look, wanted, name, ray_gpus)
    try:
        reports = gather("cluster check", looks, timeout_s)
        # Without the folder: the driver's own versions are all that is compared.
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
        return ClusterReport(reports, problems, all_reduce_s)
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _names(named: Mapping[str, str]) -> dict[str, str]:
    """Names by node, with a part of its id where Ray has several on one host."""
    counts = Counter(named.values())
    names = {}
    for node, name in named.items():
        names[node] = f"{name} {node[:8]}" if counts[name] > 1 else name
    return names


def _check_ports(probes: Mapping[str, Any]) -> list[str]:
    """Problems of nodes that do not reach a new port of another node."""
    phase = "cluster check (ports)"
    listening = {f"node {name}": start_call(probe, Probe.listen) for name, probe in probes.items()}
    opened = gather(phase, listening, CONNECT_S * 4)
    calls: dict[str, Reply[dict[str, str]]] = {}
    for name, probe in probes.items():
        others = dict(zip(probes, opened, strict=True))
        del others[name]
        calls[f"node {name}"] = start_call(probe, Probe.connect, others)
    problems = []
    # Each probe tries the others one after the other.
    results = gather(phase, calls, CONNECT_S * (len(probes) + 4))
    for name, failures in zip(probes, results, strict=True):
        for other, why in failures.items():
            problems.append(
                f"node {name} does not reach node {other}, {why}: open all ports between the "
                "nodes, or start Ray with --node-ip-address of the network that they share"
            )
    return problems


def _check_all_reduce(probes: Mapping[str, Any]) -> tuple[float | None, list[str]]:
    """The seconds of an all-reduce over all nodes, or None; and problems."""
    first = next(iter(probes))
    opened = {f"node {first}": start_call(probes[first], Probe.listen)}
    meeting = gather("cluster check", opened, CONNECT_S * 4)[0]
    calls = {
        f"node {name}": start_call(probe, Probe.all_reduce, rank, len(probes), meeting)
        for rank, (name, probe) in enumerate(probes.items())
    }
    try:
        return max(gather("cluster check (all-reduce)", calls, 2 * ALL_REDUCE_S)), []
    except WorkerFailure as error:
        return None, [
            f"{error}\n    one process per node cannot sum a tensor: name the nodes' network by "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (rlhf3d launch --env); NCCL_DEBUG=INFO "
            "shows what NCCL tries"
        ]


def _sizes(folders: Iterable[str | None], files: Iterable[str]) -> dict[str, int]:
    """Sizes of the files that the configuration names, and of those in its folders, by path."""
    paths: list[str] = []
    for folder in filter(None, folders):
        paths += [str(path) for path in sorted(Path(folder).iterdir()) if path.is_file()]
    return {path: Path(path).stat().st_size for path in [*paths, *files]}


@contextmanager
def _token_file(folder: str, wanted: Wanted) -> Iterator[Wanted]:
    """Put a file with a token into the run's folder.

    Every node must see it, and write a file of its own next to it.
    """
    wanted = replace(
        wanted,
        folder=folder,
        token_file=f".cluster-check-{secrets.token_hex(4)}",
        token=secrets.token_hex(8),
    )
    (Path(folder) / wanted.token_file).write_text(wanted.token)
    try:
        yield wanted
    finally:
        for file in Path(folder).glob(f"{wanted.token_file}*"):
            file.unlink()


def _lost_files(reports: list[NodeReport], wanted: Wanted) -> list[str]:
    """Problems of nodes whose files the driver does not see: they wrote to another folder."""
    problems = []
    for report in reports:
        wrote = report.token == wanted.token and report.writable is None
        if wrote and not written_by(wanted, report.name).is_file():
            problems.append(
                f"node {report.name}: the driver does not see what it writes to "
                f"trainer.output_dir = {wanted.folder}: it must be on a file system that all nodes "
                "share"
            )
    return problems
