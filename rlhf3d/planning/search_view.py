"""What a search found, for people and for programs.

Invariant: prints what the plans hold; computes nothing of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf3d.config.load import config_to_yaml
from rlhf3d.planning.hardware import Cluster
from rlhf3d.planning.plan import Plan
from rlhf3d.planning.search import Found
from rlhf3d.planning.times import FORWARD, UPDATE
from rlhf3d.planning.view import as_json as plan_as_json
from rlhf3d.units import GIB


def render(found: Found, cluster: Cluster, shape: Path) -> Group:
    """Tables for the terminal."""
    looked = ", ".join(f"{number} {what}" for what, number in found.counts.most_common())
    parts: list[Text | Table] = [Text(f"{shape.name} on {cluster}: {looked}")]
    if found.best:
        parts += [_table("fastest that fit", found.best), Text(_why(found.best))]
    else:
        parts.append(Text("nothing fits: take more GPUs, or shorten the sequences"))
    if found.near:
        parts.append(_table("faster, but too big or tight", found.near))
        parts.append(
            Text(
                "\n".join(
                    f"  {i}. {[*plan.problems, *plan.memory.tight][0]}"
                    for i, plan in enumerate(found.near, 1)
                )
            )
        )
    return Group(*parts)


def _table(title: str, plans: tuple[Plan, ...]) -> Table:
    """A layout a row: how it is cut, what it fills, where its seconds go."""
    table = Table(title=title, title_justify="left")
    for name in (
        "",
        "training",
        "micro-batch",
        "engines",
        "GiB",
        "step s",
        "generate",
        "passes",
        "updates",
        "other",
    ):
        text = name in ("training", "micro-batch", "engines")
        table.add_column(
            name, justify="left" if text else "right", overflow="fold", no_wrap=not text
        )
    for number, plan in enumerate(plans, 1):
        seconds = _seconds(plan)
        passes, updates = (
            sum(seconds.get(name, 0.0) for name in names) for names in (FORWARD, UPDATE)
        )
        rest = plan.step_s - passes - updates - seconds.get("generate", 0.0)
        figures = (plan.step_s, seconds.get("generate", 0.0), passes, updates, rest)
        table.add_row(
            str(number),
            _training(plan),
            _micro_batch(plan),
            _engines(plan),
            f"{plan.memory.peak[1].total / GIB:.1f}",
            *(f"{figure:.1f}" if seconds else "" for figure in figures),
        )
    return table


def _seconds(plan: Plan) -> dict[str, float]:
    """By phase; nothing where the engines cannot start."""
    return {} if plan.time is None else {phase.phase: phase.total for phase in plan.time.phases}


def _training(plan: Plan) -> str:
    lines = [str(plan.job.derived.layout)]
    lines += [f"critic {group.layout}" for group in plan.job.derived.groups[1:]]
    return "\n".join(lines)


def _micro_batch(plan: Plan) -> str:
    actor = plan.job.config.actor
    size = (
        f"{actor.ppo_max_token_len_per_gpu} tokens"
        if actor.use_dynamic_bsz
        else f"{actor.ppo_micro_batch_size_per_gpu}"
    )
    recompute = actor.layout.recompute
    extras = {
        f"{recompute} recompute": recompute != "none",
        "offload": plan.job.config.model.offload,
    }
    return ", ".join([size, *(name for name, on in extras.items() if on)])


def _engines(plan: Plan) -> str:
    rollout = plan.job.config.rollout
    where = (
        "apart"
        if rollout.placement == "disaggregated"
        else "asleep between"
        if rollout.sleep
        else "beside"
    )
    return f"{rollout.engines} x TP{rollout.tensor_parallel_size} {where}, {rollout.gpu_memory_utilization:g}"


def _why(plans: tuple[Plan, ...]) -> str:
    """The first against the second, phase by phase."""
    first = plans[0]
    lines = [
        f"1. peak {first.memory.peak[1].phase} on {first.memory.peak[0].place}; {_bubble(first)}"
    ]
    if len(plans) > 1:
        other = _seconds(plans[1])
        differences = {
            name: seconds - other.get(name, 0.0) for name, seconds in _seconds(first).items()
        }
        told = sorted(differences.items(), key=lambda item: -abs(item[1]))[:4]
        shown = ", ".join(
            f"{name} {seconds:+.1f} s" for name, seconds in told if abs(seconds) >= 0.05
        )
        lines.append(f"   against 2: {shown or 'the same within 0.05 s a phase'}")
    return "\n".join(lines)


def _bubble(plan: Plan) -> str:
    waiting, talking, total = 0.0, 0.0, 0.0
    for phase in plan.time.phases if plan.time is not None else ():
        if phase.phase in UPDATE:
            waiting += phase.parts.get("bubble", 0.0)
            talking += phase.parts.get("messages", 0.0)
            total += phase.total
    return f"of the updates {waiting / total:.0%} waits in the pipeline and {talking / total:.0%} in messages"


def as_json(found: Found) -> dict[str, Any]:
    """The plans as plain data, each with its configuration as YAML."""
    return {
        "counts": dict(found.counts),
        "best": [
            plan_as_json(plan) | {"config": config_to_yaml(plan.job.config)} for plan in found.best
        ],
        "near": [
            plan_as_json(plan) | {"config": config_to_yaml(plan.job.config)} for plan in found.near
        ],
    }
