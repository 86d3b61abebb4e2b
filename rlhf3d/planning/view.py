"""The memory of a plan as a table and lines.

Invariant: shows what the plan holds; computes nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from rlhf3d.observability.tables import Row, View, table
from rlhf3d.parallel.layout import ranges
from rlhf3d.planning.memory import PHASES, MemoryPlan, RankMemory, spare
from rlhf3d.planning.plan import Plan
from rlhf3d.units import GIB

KINDS = (
    "process",
    "weights",
    "gradients",
    "optimizer",
    "vLLM context",
    "vLLM",
    "vLLM asleep",
)
"""Resident terms, in the order of the table's rows."""
MOST_COLUMNS = 5


def show_memory(plan: Plan) -> None:
    """Print the memory of a plan on stderr."""
    warnings = [f"warning: {text}" for text in plan.memory.tight]
    lines = [*memory_lines(plan), *warnings]
    View((memory_table(plan.memory), *lines), None).show(stderr=True)


def memory_table(memory: MemoryPlan) -> Table:
    """Return terms and phases as rows, kinds of ranks as columns."""
    limit = memory.device_limit
    noun = "process" if limit is None else "device"
    there_is = "" if limit is None else f" (it has {limit / GIB:.1f})"
    ranks = _shown(memory.ranks)
    heads = [f"{noun} {ranges(rank.ranks)}\n{rank.place}" for rank in ranks]

    rows: list[Row] = []

    def add(name: str, cells: Iterable[object]) -> None:
        rows.append({"": name, **dict(zip(heads, cells, strict=True))})

    for kind in KINDS:
        sizes = [_resident(rank, kind) for rank in ranks]
        if any(sizes):
            add(kind, map(_gib, sizes))
    rows.append({})
    for phase in PHASES:
        sizes = [rank.own(phase) for rank in ranks]
        if any(sizes):
            add(f"+ {phase}", map(_gib, sizes))
    rows.append({})
    add("peak", (_peak(limit, rank) for rank in ranks))
    add("in", (rank.peak.phase for rank in ranks))
    made = table(rows, title=f"memory of a {noun}, GiB{there_is}", digits=2)
    if len(ranks) < len(memory.ranks):
        made.caption = f"{len(ranks)} of {len(memory.ranks)} kinds of ranks; --json has all"
    return made


def _resident(rank: RankMemory, kind: str) -> int:
    return sum(size for name, size in rank.resident.items() if name.endswith(kind))


def _gib(size: int) -> float | None:
    return size / GIB if size else None


def _peak(limit: int | None, rank: RankMemory) -> Text:
    """Red where it does not fit, yellow where it is tight."""
    text = Text(f"{rank.peak.total / GIB:.2f}")
    if limit is not None and rank.tightest.total + spare(limit, rank.tightest) > limit:
        text.stylize("bold red" if rank.peak.total > limit else "bold yellow")
    return text


def _shown(ranks: tuple[RankMemory, ...]) -> list[RankMemory]:
    """The first kinds of ranks, the fullest and the last."""
    # The fullest and the last may be among the first: a set shows each once.
    shown = set(range(MOST_COLUMNS - 2)) | {len(ranks) - 1}
    shown.add(ranks.index(max(ranks, key=lambda rank: rank.peak.total)))
    return [rank for number, rank in enumerate(ranks) if number in shown]


def memory_lines(plan: Plan) -> list[str]:
    """Return the peak, an engine rank's memory and the host's, a line each."""
    memory, rollout = plan.memory, plan.job.config.rollout
    engine, host = memory.engine, memory.host
    rank, phase = memory.peak
    terms = ", ".join(f"{name} {size / GIB:.2f}" for name, size in host.terms.items())
    return [
        f"peak       {phase.phase} on {rank.place}: {phase.total / GIB:.1f} GiB",
        f"engine     a rank: weights {engine.weights / GIB:.2f}, "
        f"activations {engine.activations / GIB:.2f}, KV cache {engine.kv_cache / GIB:.2f} GiB: "
        f"{engine.sequences} sequences of {engine.max_model_len} tokens at once "
        f"(rollout.max_num_seqs {rollout.max_num_seqs})",
        f"host       {host.phase}: {host.total / GIB:.1f} of {host.limit / GIB:.1f} GiB a node "
        f"({terms})",
    ]
