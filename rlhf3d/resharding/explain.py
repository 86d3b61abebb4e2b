"""A reshard plan for people and programs: bytes per rank, lower bound, full gather.

Invariant: every figure is computed from the plan itself, for layouts of any size, with nothing
started. Pure: no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch

from rich.table import Table

from rlhf3d.config.derived import derive
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config
from rlhf3d.models.boxes import show
from rlhf3d.models.spec import ModelSpec, check_layout, load_spec
from rlhf3d.models.weights import num_weights
from rlhf3d.observability.tables import Row, View, table
from rlhf3d.parallel.layout import ranges
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.resharding.plan import ReshardPlan, TransferOp
from rlhf3d.resharding.setup import SLOTS, SyncSetup, sync_setup
from rlhf3d.units import counted, format_bytes, size_unit

MOST_ROUTES = 200
"""Routes that are printed; `--json` has all."""


@dataclass(frozen=True)
class RankBytes:
    """What one engine rank takes, bytes."""

    destination: int
    engines: tuple[int, ...]
    rank: int
    """Tensor-parallel rank in these engines."""
    device: int | None
    needed: int
    local: int
    """On its own device already."""
    received: int
    bound: int
    """The least any plan can let this device receive for this rank."""
    full_gather: int
    """What a rank would receive that gathers complete tensors: all but its own shard, the mean of
    the training ranks'.
    """
    senders: int
    ops: int
    buckets: int
    """How many portions the bytes come in."""


@dataclass(frozen=True)
class Explanation:
    """A plan in numbers."""

    model_bytes: int
    """The complete policy in the engines' dtype."""
    formula_bytes: int | None
    """HybridFlow's bound (arXiv 2409.19256, Table 2): (tp - g) / (tp g) of the model.

    Where g divides tp, colocated, of a dense model.
    """
    buffer_bytes: int
    """Extra memory of a sync per engine rank."""
    ranks: tuple[RankBytes, ...]
    sent: tuple[int, ...]
    """By training rank, to other devices."""


def setup_of(config: Config, gpus: bool) -> SyncSetup:
    """A run's sync as it would be set up, read from the model's config.json.

    `gpus`: as on GPUs, one per rank. Raises ValueError for a model or layout that cannot be
    planned.
    """
    on_gpu = gpus or config.cluster.platform == "cuda"
    platform = CUDAPlatform(reason="reshard") if on_gpu else CPUPlatform(reason="reshard")
    # First, as settings that are null mean what the platform says.
    config = resolve_platform(config, platform)
    layout, spec = derive(config).layout, load_spec(config.model.path, with_weights=False)
    check_layout(spec, layout)
    # Without GPUs the plan is explained for one host, on which all ranks share memory.
    per_node = config.cluster.gpus_per_node if on_gpu else layout.world_size
    nodes = [rank // per_node for rank in range(layout.world_size)]
    return sync_setup(config.rollout, spec, layout, platform, "explain", nodes)


def explain(setup: SyncSetup) -> Explanation:
    """The figures of a setup's plan. Raises ValueError as the planner does."""
    plan, size = setup.plan, setup.item_bytes
    traffic = plan.traffic
    layout, spec = setup.layout, setup.spec
    # Distinct shards: other ranks hold copies. Experts are whole, and shared out over ep ranks.
    shards, expert_shards = layout.tp * layout.pp, layout.ep * layout.pp
    model, experts = num_weights(spec, "lm") * size, _expert_weights(spec) * size
    held = (model - experts) // shards + experts // expert_shards
    ranks = []
    for place in plan.destinations:
        dst = place.number
        ranks.append(
            RankBytes(
                dst,
                place.engines,
                place.index,
                place.device,
                needed=traffic.needed[dst] * size,
                local=traffic.local[dst] * size,
                received=traffic.received[dst] * size,
                bound=plan.lower_bound(dst) * size,
                full_gather=model - held,
                senders=len(plan.senders_to(dst)),
                ops=traffic.ops[dst],
                buckets=len(setup.buckets(dst)),
            )
        )
    buckets: list[int] = []
    for place in plan.destinations:
        buckets += [bucket.num_bytes for bucket in setup.buckets(place.number)]
    engine = setup.tensor_parallel_size
    # The formula is for an engine rank that finds its share, cut as by the trainer, on its own
    # device: experts are cut by ep.
    nested = setup.colocated and layout.tp % engine == 0 and not spec.num_experts
    return Explanation(
        model_bytes=model,
        formula_bytes=model * (shards - engine) // (shards * engine) if nested else None,
        buffer_bytes=SLOTS * max(buckets),
        ranks=tuple(ranks),
        sent=tuple(elements * size for elements in traffic.sent),
    )


def _expert_weights(spec: ModelSpec) -> int:
    """How many numbers the experts of all layers hold: gate, up and down of each."""
    return spec.num_layers * spec.num_experts * 3 * spec.hidden_size * spec.moe_ffn_size


def explain_view(setup: SyncSetup, model: str, pattern: str | None = None) -> View:
    """Return the figures of a setup, and with `pattern` the routes of the tensors it matches."""
    facts = explain(setup)
    parts: list[str | Table] = ["\n".join(_lines(setup, facts, model)), _rank_table(facts)]
    data: dict[str, object] = asdict(facts)
    if pattern is not None:
        routes = _routes(setup.plan, pattern)
        parts.append(_route_table(setup.plan, routes, f"routes of {pattern}"))
        data["routes"] = [str(op) for op in routes]
    return View(parts, data)


def _lines(setup: SyncSetup, facts: Explanation, model: str) -> list[str]:
    spec, sites = setup.spec, setup.plan.sites
    count = len(sites.node_of_device)
    devices = counted(count, "GPU")
    if sites.slots is None:
        devices = f"{counted(count, 'host')}, where ranks share memory"
    place = "colocated" if setup.colocated else "on devices of their own"
    ops = sum(setup.plan.traffic.ops)
    lines = [
        f"model      {model}: {spec.family}, {spec.num_layers} layers, "
        f"{format_bytes(facts.model_bytes)} in {setup.dtype}",
        f"from       {setup.layout} = {setup.layout.world_size} training ranks on {devices}",
        f"to         {counted(setup.engines, 'engine')} x TP{setup.tensor_parallel_size}, {place}",
        f"plan       {ops} ops; training ranks send {_range(facts.sent)} each to other devices",
        f"memory     {format_bytes(facts.buffer_bytes)} of buckets per engine rank",
    ]
    if facts.formula_bytes is not None and sites.slots is not None:
        lines.append(
            "formula    (n - g) / (n g) of the model, evenly cut: "
            f"{format_bytes(facts.formula_bytes)} per rank"
        )
    return lines


def _rank_table(facts: Explanation) -> Table:
    """Ranks of several engines that need and get the same share a row."""
    unit, size = size_unit(max(rank.needed for rank in facts.ranks))
    alike: dict[tuple[int, ...], list[RankBytes]] = defaultdict(list)
    for rank in facts.ranks:
        # Not the device, engines or destination: these are what may differ within a row.
        key = (rank.rank, rank.needed, rank.local, rank.received, rank.senders, rank.ops)
        alike[key].append(rank)
    rows: list[Row] = []
    for ranks in alike.values():
        first, engines = ranks[0], set[int]()
        for rank in ranks:
            engines.update(rank.engines)
        row: Row = {
            "engines": ranges(sorted(engines), most=6),
            "rank": first.rank,
            "needs": first.needed / size,
            "local": first.local / size,
            "receives": first.received / size,
            "bound": first.bound / size,
            "full gather": first.full_gather / size,
            "senders": first.senders,
            "ops": first.ops,
        }
        rows.append(row)
    return table(rows, f"bytes of an engine rank, {unit}", digits=2)


def _route_table(plan: ReshardPlan, routes: Sequence[TransferOp], title: str) -> Table:
    made = table([_route(plan, op) for op in routes[:MOST_ROUTES]], title)
    if len(routes) > MOST_ROUTES:
        made.caption = f"{MOST_ROUTES} of {len(routes)}; --json has all"
    return made


def _route(plan: ReshardPlan, op: TransferOp) -> Row:
    place = plan.destinations[op.dst]
    engines = ranges(place.engines, most=6)
    return {
        "tensor": op.tensor,
        "block": show(op.box),
        "from": f"rank {op.src_rank} {op.src_param}{show(op.src_box)}",
        "to": f"engine {engines} rank {place.index} {op.dst_param}{show(op.dst_box)}",
    }


def _routes(plan: ReshardPlan, pattern: str) -> list[TransferOp]:
    """Transfers of the tensors that `pattern` matches. ValueError where there is none."""
    routes: list[TransferOp] = []
    for place in plan.destinations:
        routes += [op for op in plan.ops_to(place.number) if fnmatch(op.tensor, pattern)]
    if not routes:
        raise ValueError(
            f"--tensor {pattern!r} matches no tensor; they are named as in the model folder, "
            "* stands for any text"
        )
    return routes


def _range(counts: tuple[int, ...]) -> str:
    least, most = min(counts), max(counts)
    return format_bytes(most) if least == most else f"{format_bytes(least)} to {format_bytes(most)}"
