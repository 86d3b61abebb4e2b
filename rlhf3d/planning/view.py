"""A plan for people and for programs.

Invariant: prints what the plan holds; computes nothing of it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf3d.config.derived import summary_lines
from rlhf3d.parallel.layout import ranges
from rlhf3d.planning.memory import MemoryPlan, RankMemory, spare
from rlhf3d.planning.plan import Plan
from rlhf3d.planning.times import TimePlan
from rlhf3d.terminal import Terminal
from rlhf3d.units import GIB

_KINDS = ("weights", "gradients", "optimizer")
MOST_COLUMNS = 5


def render(plan: Plan, shape: Path) -> Group:
    """Tables for the terminal."""
    job, memory = plan.job, plan.memory
    hardware = job.cluster.hardware
    assumed = "measured" if hardware.measured else "from data sheets, not measured"
    numbers = hardware.measured_here or assumed
    lines = [line for line in summary_lines(job.config, job.derived) if line.split()[0] in _SHOWN]
    lines.append(
        f"shape      {shape.name}/config.json: {job.spec.family}, {job.spec.num_layers} layers"
    )
    lines.append(
        f"devices    {job.cluster} ({numbers}), {job.devices_needed if job.on_gpu else 1} needed"
    )
    after = [*_memory_lines(plan), ""]
    return Group(
        Text("\n".join(lines)),
        _memory_table(memory),
        Text("\n".join(after)),
        *([] if plan.time is None else [time_table(plan.time)]),
        Text("\n".join([*_time_lines(plan), *_verdict(plan)])),
    )


_SHOWN = {"layout", "rollout", "step", "actor", "critic"}


def show_memory(plan: Plan) -> None:
    """Print the memory of a plan on stderr."""
    console = Terminal(stderr=True)
    console.print(_memory_table(plan.memory))
    console.print(
        Text("\n".join([*_memory_lines(plan), *(f"warning: {text}" for text in plan.memory.tight)]))
    )


def _memory_table(memory: MemoryPlan) -> Table:
    """Terms and phases down, kinds of ranks across."""
    limit = "" if memory.device_limit is None else f" (it has {memory.device_limit / GIB:.1f})"
    noun = "process" if memory.device_limit is None else "device"
    table = Table(title=f"memory of a {noun}, GiB{limit}", title_justify="left")
    ranks = _shown(memory.ranks)
    table.add_column("", justify="left", no_wrap=True)
    for rank in ranks:
        table.add_column(f"{noun} {ranges(rank.ranks)}\n{rank.place}", justify="right")
    for kind in ("process", *_KINDS, "vLLM context", "vLLM", "vLLM asleep"):
        sizes = [
            sum(size for name, size in rank.resident.items() if name.endswith(kind))
            for rank in ranks
        ]
        if any(sizes):
            table.add_row(kind, *map(_gib, sizes))
    table.add_section()
    for name in dict.fromkeys(phase.phase for rank in ranks for phase in rank.phases):
        if any(rank.own(name) for rank in ranks):
            table.add_row(f"+ {name}", *(_gib(rank.own(name)) for rank in ranks))
    table.add_section()
    over = [_style(memory.device_limit, rank) for rank in ranks]
    peaks = (Text(_gib(rank.peak.total), style) for rank, style in zip(ranks, over, strict=True))
    table.add_row("peak", *peaks)
    table.add_row("in", *(rank.peak.phase for rank in ranks))
    if len(ranks) < len(memory.ranks):
        table.caption = f"{len(ranks)} of {len(memory.ranks)} kinds of ranks; --json has all"
    return table


def _style(limit: int | None, rank: RankMemory) -> str:
    """Red where it does not fit, yellow where it is tight."""
    if limit is None or rank.tightest.total + spare(limit, rank.tightest) <= limit:
        return ""
    return "bold red" if rank.peak.total > limit else "bold yellow"


def _shown(ranks: tuple[RankMemory, ...]) -> list[RankMemory]:
    """The first ones, the fullest and the last."""
    fullest = max(ranks, key=lambda rank: rank.peak.total)
    return [
        r
        for i, r in enumerate(ranks)
        if i < MOST_COLUMNS - 2 or r is fullest or i == len(ranks) - 1
    ]


def _memory_lines(plan: Plan) -> list[str]:
    memory, job = plan.memory, plan.job
    engine, host = memory.engine, memory.host
    rank, phase = memory.peak
    terms = ", ".join(f"{name} {size / GIB:.2f}" for name, size in host.terms.items())
    return [
        f"peak       {phase.phase} on {rank.place}: {phase.total / GIB:.1f} GiB",
        f"engine     a rank: weights {engine.weights / GIB:.2f}, activations {engine.activations / GIB:.2f}, "
        f"KV cache {engine.kv_cache / GIB:.2f} GiB: {engine.sequences} sequences of {engine.max_model_len} tokens at "
        f"once (rollout.max_num_seqs {job.config.rollout.max_num_seqs})",
        f"host       {host.phase}: {host.total / GIB:.1f} of {host.limit / GIB:.1f} GiB a node ({terms})",
    ]


def time_table(time: TimePlan) -> Table:
    """Seconds of the phases of a step."""
    table = Table(title="time of a step, s", title_justify="left")
    table.add_column("", justify="left", no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("of that", justify="left")
    for phase in time.phases:
        parts = ", ".join(
            f"{name} {seconds:.2g}" for name, seconds in phase.parts.items() if seconds >= 0.005
        )
        table.add_row(phase.phase, f"{phase.total:.1f}", parts)
    table.add_section()
    table.add_row("step", f"{time.step_s:.1f}", "without scoring and validation")
    return table


def _time_lines(plan: Plan) -> list[str]:
    time, lengths = plan.time, plan.job.lengths
    if time is None:
        return ["time       none: the engines cannot start"]
    noun = "GPU" if plan.job.on_gpu else "machine"
    lines = [
        f"lengths    {lengths.prompt:.0f} + {lengths.response:.0f} tokens on average (--prompt-tokens, "
        f"--response-tokens): {time.tokens_s:,.0f} tokens/s, {time.tokens_s / time.devices:,.0f} a {noun}"
    ]
    if time.hours is None or time.device_hours is None:
        return [
            *lines,
            "run        its steps are not known: data.train_files are not here; give --rows",
        ]
    run = f"{time.steps} steps, {time.hours:.1f} hours"
    return [
        *lines,
        f"run        {run}" + (f", {time.device_hours:.1f} GPU-hours" if plan.job.on_gpu else ""),
    ]


def _verdict(plan: Plan) -> list[str]:
    reasons = [*plan.problems, *plan.memory.tight]
    return [plan.verdict + (":" if reasons else ""), *(f"  - {reason}" for reason in reasons)]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; bytes and seconds."""
    job, memory = plan.job, plan.memory
    rank, phase = memory.peak
    return {
        "fits": not plan.problems,
        "verdict": plan.verdict,
        "problems": list(plan.problems),
        "tight": list(plan.memory.tight),
        "devices": {
            "hardware": job.cluster.hardware.name,
            "measured": job.cluster.hardware.measured_here,
            "found": job.cluster.devices,
            "needed": job.devices_needed,
        },
        "layouts": {model.role: str(model.layout) for model in job.models},
        "memory": {
            "peak": {"rank": rank.ranks[0], "phase": phase.phase, "bytes": phase.total},
            "device_limit": memory.device_limit,
            "ranks": [
                {
                    "ranks": list(group.ranks),
                    "place": group.place,
                    "states": {role: asdict(states) for role, states in group.states.items()},
                    "phases": {phase.phase: dict(phase.terms) for phase in group.phases},
                }
                for group in memory.ranks
            ],
            "engine": asdict(memory.engine) | {"sequences": memory.engine.sequences},
            "host": {
                "phase": memory.host.phase,
                "limit": memory.host.limit,
                "terms": dict(memory.host.terms),
            },
        },
        "time": None if plan.time is None else _time_json(plan.time),
    }


def _time_json(time: TimePlan) -> dict[str, Any]:
    return {
        "phases": {phase.phase: dict(phase.parts) for phase in time.phases},
        "step_s": time.step_s,
        "tokens_s": time.tokens_s,
        "steps": time.steps,
        "hours": time.hours,
        "device_hours": time.device_hours,
    }
