"""Named hardware: the numbers a plan is computed with.

Invariant: every assumption about a machine is a number in `hardware.yaml` (or the user's own file
of the same form), with its source; none is in the code of the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_type_hints

from rlhf3d.config.load import coerce, read_sections
from rlhf3d.units import ceil_div

NOT_IN_FILES = frozenset({"name", "measured_here"})
"""Fields that are not in an entry of a hardware file: its key, and one set elsewhere."""
FILE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Hardware:
    """One device (a GPU, or a host's CPU) and what connects it.

    Units are in the names and in `hardware.yaml`.
    """

    name: str
    source: str
    measured: bool
    """Whether these numbers were measured by this project, and not read from a data sheet."""
    kind: Literal["cpu", "cuda"]
    memory_gib: float | None
    """Of one device; None where ranks share the host's memory."""
    flops: dict[str, float]
    """FLOP/s of one device by dtype."""
    matmul_efficiency: float
    matmul_half: float
    memory_gbs: float
    memory_efficiency: float
    link_gbs: float
    network_gbs: float
    link_efficiency: float
    exchange_efficiency: float
    latency_s: float
    network_latency_s: float
    disk_gbs: float
    host_gbs: float
    sync_gbs: float
    sync_bucket_s: float
    rest_s: float
    cores: int
    devices_per_node: int
    host_memory_gib: float
    process_gib: float
    host_process_gib: float
    engine_process_gib: float
    engine_context_gib: float
    engine_comm_gib: float
    batched_tokens: int
    layer_overhead_s: float
    expert_overhead_s: float
    decode_overhead_s: float
    decode_sequence_s: float
    decode_kernel_s: float
    decode_eager_s: float
    measured_here: str = ""
    """Which of these were measured on this device (`rlhf3d.planning.measured`), and how; empty for
    none."""

    # The generated hash would fail at the dict `flops`; equality still compares every field.
    def __hash__(self) -> int:
        return hash((self.name, self.source, self.measured_here))

    def matmul_flops(self, dtype: str) -> float:
        """FLOP/s that large matrix products reach."""
        return self.flops[dtype] * self.matmul_efficiency

    def product_flops(self, rows: float, inner: float, columns: float) -> float:
        """Return the operations of a [rows, inner] x [inner, columns] product.

        Small ones count as what they cost: tiles at the edges and the filling of pipelines take as
        long as `matmul_half` more of each side.
        """
        small = self.matmul_half * (1 / max(rows, 1.0) + 1 / inner + 1 / columns)
        return 2 * rows * inner * columns * (1 + small)

    @property
    def read_bytes_s(self) -> float:
        """Bytes a second that decoding reads of a device's memory."""
        return self.memory_gbs * 1e9 * self.memory_efficiency

    def is_device(self, device: str) -> bool:
        """Whether a device that its driver calls so ("NVIDIA A100-SXM4-80GB") is this hardware."""
        # By complete words: `B200` is in the name of a GB200 too.
        return self.name == device or self.name.lower() in device.lower().replace("-", " ").split()


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind."""

    hardware: Hardware
    devices: int
    devices_per_node: int

    @property
    def nodes(self) -> int:
        """Nodes these devices take."""
        return ceil_div(self.devices, self.devices_per_node)

    def inside(self, ranks: int, stride: int = 1) -> bool:
        """Whether a group of `ranks` whose numbers are `stride` apart is on one node."""
        # Groups are taken to begin with a node's first device. CPU ranks are all on one host.
        return (ranks - 1) * stride < self.devices_per_node or self.hardware.kind == "cpu"

    def bandwidth(self, ranks: int, stride: int = 1) -> float:
        """Bytes a second, one direction, of a device in such a group."""
        gbs = self.hardware.link_gbs if self.inside(ranks, stride) else self.hardware.network_gbs
        return gbs * 1e9 * self.hardware.link_efficiency

    def latency_s(self, ranks: int, stride: int = 1) -> float:
        """Of a collective or message in such a group."""
        if self.inside(ranks, stride):
            return self.hardware.latency_s
        return self.hardware.network_latency_s

    def exchange_s(self, ranks: int, size: float) -> float:
        """An all-to-all of `size` bytes a rank, equal parts to each.

        Those to other nodes go over the network meanwhile.
        """
        hardware = self.hardware
        # A rank keeps its own of the `ranks` parts, and sends `near` - 1 of them inside its node.
        near = ranks if self.inside(ranks) else self.devices_per_node
        link = hardware.link_gbs * 1e9 * hardware.exchange_efficiency
        network = hardware.network_gbs * 1e9 * hardware.exchange_efficiency
        inside_s = size * (near - 1) / ranks / link
        outside_s = size * (ranks - near) / ranks / network
        return max(inside_s, outside_s) + self.latency_s(ranks)

    def __str__(self) -> str:
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.devices} x {self.hardware.name}{nodes}"


def load_hardware(path: str | Path = FILE) -> dict[str, Hardware]:
    """All hardware of a file, by name.

    ValueError, naming file and key, where an entry is not complete.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--hardware: no file {path}; {FILE} shows the form")
    raw = read_sections(path, f"as in {FILE}")
    wanted = {item.name for item in fields(Hardware)} - NOT_IN_FILES
    kinds, found = get_type_hints(Hardware), {}
    for name, entry in raw.items():
        # No number has a default: all that is assumed of a machine stands in the file.
        if not isinstance(entry, dict) or set(entry) != wanted:
            given = set(entry) if isinstance(entry, dict) else set()
            raise ValueError(
                f"{path}: {name} lacks {', '.join(sorted(wanted - given)) or 'nothing'} and has "
                f"{', '.join(sorted(given - wanted)) or 'nothing'} too many; {FILE} shows the form"
            )
        try:
            values = {key: coerce(value, kinds[key]) for key, value in entry.items()}
        except TypeError as error:
            raise ValueError(
                f"{path}: {name} has {error}, which is no number or name; {FILE} shows the form"
            ) from None
        found[str(name)] = Hardware(name=str(name), **values)
    return found


def parse_cluster(text: str, known: Mapping[str, Hardware]) -> Cluster:
    """`8xH100` -> eight of them; nodes are as big as the hardware's.

    ValueError for anything else.
    """
    count, times, name = text.replace("×", "x").partition("x")
    matches = [hardware for key, hardware in known.items() if key.lower() == name.lower()]
    if not times or not count.strip().isdigit() or int(count) < 1 or not matches:
        raise ValueError(
            f"--gpus {text!r}: expected a number, x and one of {', '.join(known)}, such as 8xH100"
        )
    hardware, devices = matches[0], int(count)
    return Cluster(hardware, devices, hardware.devices_per_node)
