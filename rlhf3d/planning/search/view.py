"""A plan with its time, and the results of a search, for people and for programs.

Invariant: shows what the plans hold; computes nothing of them but sums of their phases.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.summary import summary_lines
from rlhf3d.observability.tables import Row, View, table
from rlhf3d.planning.hardware import Cluster
from rlhf3d.planning.memory import MemoryPlan, RankMemory
from rlhf3d.planning.search.generation import decoding_batch, running_sequences
from rlhf3d.planning.search.phase_time import PhaseTime
from rlhf3d.planning.search.plan import TimedPlan
from rlhf3d.planning.search.ranking import Found, Split
from rlhf3d.planning.search.schedule import ALONE, Mode, Schedule, mode_of
from rlhf3d.planning.search.times import FORWARD, UPDATE, TimePlan
from rlhf3d.planning.view import memory_lines, memory_table
from rlhf3d.units import GIB

SUMMARY = {"layout", "rollout", "step", "staleness", "old_policy", "actor", "critic"}
"""Lines of a configuration's summary that a plan repeats."""
NAMED_S = 0.005
"""Seconds from which a part of a phase is worth naming."""


def plan_view(plan: TimedPlan, shape: Path) -> View:
    """Return one plan; `shape` is the folder that the model's shape was read from."""
    parts: list[str | Table] = ["\n".join(_job_lines(plan, shape)), memory_table(plan.memory)]
    parts.append("\n".join([*memory_lines(plan), ""]))
    if plan.time is not None:
        parts.append(_time_table(plan.time))
    parts.append("\n".join([*_time_lines(plan), *_verdict(plan)]))
    return View(parts, plan_data(plan))


def _job_lines(plan: TimedPlan, shape: Path) -> list[str]:
    job, hardware = plan.job, plan.job.cluster.hardware
    source = "measured" if hardware.measured else "from data sheets, not measured"
    needed = job.devices_needed if job.on_gpu else 1
    summary = summary_lines(job.config, job.derived)
    return [
        *(line for line in summary if line.split()[0] in SUMMARY),
        f"shape      {shape.name}/config.json: {job.spec.family}, {job.spec.num_layers} layers",
        f"devices    {job.cluster} ({hardware.measured_here or source}), {needed} needed",
    ]


def _time_table(time: TimePlan) -> Table:
    rows: list[Row] = [
        {"": phase.phase, "s": phase.total, "of that": _named_parts(phase)} for phase in time.phases
    ]
    rows.append({})
    rows += _side_rows(time)
    rows.append({"": "step", "s": time.step_s, "of that": "without scoring and validation"})
    return table(rows, title="time of a step, s")


def _side_rows(time: TimePlan) -> list[Row]:
    """The two sides of a step that lie beside each other; nothing where they do not."""
    schedule = time.schedule
    if schedule.mode == "in_turn":
        return []
    of_engines = f"waits {schedule.engines_wait_s:.1f} for training"
    if schedule.longest_s:
        of_engines += f"; the longest trajectory {schedule.longest_s:.1f} from being asked for"
    of_training = f"waits {schedule.training_waits_s:.1f} for samples"
    if schedule.shared_s:
        of_training += f"; its devices also do {schedule.shared_s:.1f} of the engines' side"
    names = [phase.phase for phase in time.phases if phase.phase in ALONE[schedule.mode]]
    alone = " and ".join(names)
    return [
        {"": "engines' side", "s": schedule.engines_s, "of that": of_engines},
        {"": "training's side", "s": schedule.training_s, "of that": of_training},
        {"": "neither", "s": schedule.alone_s, "of that": alone},
    ]


def _named_parts(phase: PhaseTime) -> str:
    named = [f"{name} {seconds:.2g}" for name, seconds in phase.parts.items() if seconds >= NAMED_S]
    return ", ".join(named)


def _time_lines(plan: TimedPlan) -> list[str]:
    time, lengths = plan.time, plan.job.lengths
    if time is None:
        return ["time       none: the engines cannot start"]
    device = "GPU" if plan.job.on_gpu else "machine"
    line = (
        f"lengths    {lengths.prompt:.0f} + {lengths.response:.0f} tokens on average "
        f"(--prompt-tokens, --response-tokens): {time.tokens_s:,.0f} tokens/s, "
        f"{time.tokens_s / time.devices:,.0f} per {device}"
    )
    if time.hours is None or time.device_hours is None:
        run = "its steps are not known: data.train_files are not here; give --rows"
    else:
        run = f"{time.steps} steps, {time.hours:.1f} hours"
        if plan.job.on_gpu:
            run += f", {time.device_hours:.1f} GPU-hours"
    return [line, *_turn_lines(plan), *_schedule_lines(plan), f"run        {run}"]


def _schedule_lines(plan: TimedPlan) -> list[str]:
    """What running ahead gains, and what the engines hold meanwhile."""
    time, job = plan.time, plan.job
    if time is None or time.schedule.mode == "in_turn":
        return []
    schedule = time.schedule
    lines = [
        f"schedule   {_sum_text(schedule)} = {schedule.step_s:.1f} s a step; in turn "
        f"{time.in_turn_s:.1f} s, {time.in_turn_s / schedule.step_s:.2f} x as long"
    ]
    if schedule.mode == "in_flight":
        running = running_sequences(job)
        lines.append(
            f"in flight  {running:.0f} sequences run in an engine, which decodes "
            f"{decoding_batch(job, running):.0f} of them at once (rollout.max_num_seqs "
            f"{job.config.rollout.max_num_seqs}, and what its KV cache holds)"
        )
    return lines


def _sum_text(schedule: Schedule) -> str:
    """The seconds of a step as they are put together."""
    training = f"{schedule.training_s:.1f}"
    sides = [f"engines {schedule.engines_s:.1f}", f"training {training}"]
    if schedule.shared_s:
        sides[1] += f" + shared {schedule.shared_s:.1f}"
    if schedule.longest_s:
        steps = schedule.versions + 1
        sides.append(f"(longest {schedule.longest_s:.1f} + {training}) / {steps}")
    return f"max({', '.join(sides)}) + {schedule.alone_s:.1f}"


def _turn_lines(plan: TimedPlan) -> list[str]:
    """What is assumed of trajectories with an environment."""
    config, lengths = plan.job.config, plan.job.lengths
    if not config.environment.enabled:
        return []
    return [
        f"turns      {lengths.turns:.1f} on average, of at most {config.environment.max_turns} "
        f"(--turns); of the response {lengths.sampled:.0f} tokens are sampled and "
        f"{lengths.observed:.0f} observed (--observation-tokens), computed once: the prefix cache "
        "holds what came before",
        f"calls      {lengths.environment_s:g} s each (--environment-seconds), the longest of a "
        f"batch {lengths.slowest_call_s:g} s (--longest-environment-seconds), "
        f"{config.environment.max_concurrent} environments at once; one row of the batch a "
        "trajectory",
    ]


def _verdict(plan: TimedPlan) -> list[str]:
    reasons = [*plan.problems, *plan.memory.tight]
    return [plan.verdict + (":" if reasons else ""), *(f"  - {reason}" for reason in reasons)]


def plan_data(plan: TimedPlan) -> dict[str, Any]:
    """Return a plan as plain data; bytes and seconds."""
    job = plan.job
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
        "memory": _memory_data(plan.memory),
        "lengths": asdict(job.lengths),
        "time": None if plan.time is None else _time_data(plan.time),
    }


def _memory_data(memory: MemoryPlan) -> dict[str, Any]:
    rank, phase = memory.peak
    engine, host = memory.engine, memory.host
    return {
        "peak": {"rank": rank.ranks[0], "phase": phase.phase, "bytes": phase.total},
        "device_limit": memory.device_limit,
        "ranks": [_rank_data(rank) for rank in memory.ranks],
        "engine": asdict(engine) | {"sequences": engine.sequences},
        "host": {"phase": host.phase, "limit": host.limit, "terms": dict(host.terms)},
    }


def _rank_data(rank: RankMemory) -> dict[str, Any]:
    return {
        "ranks": list(rank.ranks),
        "place": rank.place,
        "states": {role: asdict(states) for role, states in rank.states.items()},
        "phases": {phase.phase: dict(phase.terms) for phase in rank.phases},
    }


def _time_data(time: TimePlan) -> dict[str, Any]:
    return {
        "phases": {phase.phase: dict(phase.parts) for phase in time.phases},
        "schedule": _sides_data(time.schedule) | {"in_turn_s": time.in_turn_s},
        "step_s": time.step_s,
        "tokens_s": time.tokens_s,
        "steps": time.steps,
        "hours": time.hours,
        "device_hours": time.device_hours,
    }


def _sides_data(schedule: Schedule) -> dict[str, Any]:
    return asdict(schedule) | {
        "step_s": schedule.step_s,
        "engines_wait_s": schedule.engines_wait_s,
        "training_waits_s": schedule.training_waits_s,
    }


def search_view(found: Found, cluster: Cluster, shape: Path) -> View:
    """Return the plans that a search found, each with its configuration as YAML."""
    looked = ", ".join(f"{number} {what}" for what, number in found.counts.most_common())
    parts: list[str | Table] = [f"{shape.name} on {cluster}: {looked}"]
    if found.best:
        parts += [_search_table("fastest that fit", found.best), _comparison(found.best)]
        parts += _split_tables(found)
    else:
        parts.append("nothing fits: take more GPUs, or shorten the sequences")
    if found.near:
        # A plan of `near` does not fit or is tight, so that it has a reason.
        reasons = [[*plan.problems, *plan.memory.tight][0] for plan in found.near]
        parts.append(_search_table("faster, but too big or tight", found.near))
        parts.append("\n".join(f"  {i}. {reason}" for i, reason in enumerate(reasons, 1)))
    return View(
        parts,
        {
            "counts": dict(found.counts),
            "best": [_with_config(plan) for plan in found.best],
            "near": [_with_config(plan) for plan in found.near],
            "splits": [_split_data(split) for split in found.splits],
        },
    )


def _split_data(split: Split) -> dict[str, Any]:
    schedule = split.schedule
    return {
        "engine_devices": split.dedicated or split.training,
        "training_devices": split.training,
        "colocated": not split.dedicated,
        "schedule": None if schedule is None else _sides_data(schedule),
    }


def _split_tables(found: Found) -> list[Table]:
    """The fastest of each way to share the devices out; none where the sides take turns."""
    mode = mode_of(found.best[0].job.config.rollout)
    if mode == "in_turn":
        return []
    rows: list[Row] = []
    for split in found.splits:
        engines = str(split.dedicated) if split.dedicated else "the same"
        row: dict[str, object] = {"train": split.training, "generate": engines}
        rows.append(row | _side_columns(split.schedule, mode))
    return [table(rows, "fastest by devices that")]


def _with_config(plan: TimedPlan) -> dict[str, Any]:
    return plan_data(plan) | {"config": config_to_yaml(plan.job.config)}


def _search_table(title: str, plans: tuple[TimedPlan, ...]) -> Table:
    return table([_search_row(number, plan) for number, plan in enumerate(plans, 1)], title)


def _search_row(number: int, plan: TimedPlan) -> Row:
    """How the run is cut, what it fills, where its seconds go."""
    row: dict[str, object] = {
        "": number,
        "training": _training(plan),
        "micro-batch": _micro_batch(plan),
        "engines": _engines(plan),
        "GiB": plan.memory.peak[1].total / GIB,
    }
    if _in_turn(plan):
        return row | _phase_columns(plan)
    schedule = None if plan.time is None else plan.time.schedule
    return row | _side_columns(schedule, mode_of(plan.job.config.rollout))


def _in_turn(plan: TimedPlan) -> bool:
    return mode_of(plan.job.config.rollout) == "in_turn"


def _phase_columns(plan: TimedPlan) -> dict[str, object]:
    """Seconds of a step by phases; nothing where the engines cannot start."""
    names = ("step s", "generate", "passes", "updates", "other")
    if plan.time is None:
        return dict.fromkeys(names)
    seconds = _seconds(plan)
    generate = seconds["generate"]
    passes = sum(seconds.get(name, 0.0) for name in FORWARD)
    updates = sum(seconds.get(name, 0.0) for name in UPDATE)
    other = plan.step_s - generate - passes - updates
    return dict(zip(names, (plan.step_s, generate, passes, updates, other), strict=True))


def _side_columns(schedule: Schedule | None, mode: Mode) -> dict[str, object]:
    """Seconds of both sides of a step; nothing where there is none."""
    between = "longest" if mode == "in_flight" else "shared"
    names = ("step s", "engines' side", "training's side", between, "neither")
    if schedule is None:
        return dict.fromkeys(names)
    seconds = (
        schedule.step_s,
        schedule.engines_s,
        schedule.training_s,
        schedule.longest_s if mode == "in_flight" else schedule.shared_s,
        schedule.alone_s,
    )
    return dict(zip(names, seconds, strict=True))


def _seconds(plan: TimedPlan) -> dict[str, float]:
    """By phase; nothing where the engines cannot start."""
    return {} if plan.time is None else {phase.phase: phase.total for phase in plan.time.phases}


def _training(plan: TimedPlan) -> str:
    lines = [str(plan.job.derived.layout)]
    lines += [f"critic {group.layout}" for group in plan.job.derived.groups[1:]]
    return "\n".join(lines)


def _micro_batch(plan: TimedPlan) -> str:
    actor = plan.job.config.actor
    words = [str(actor.ppo_micro_batch_size_per_gpu)]
    if actor.use_dynamic_bsz:
        words = [f"{actor.ppo_max_token_len_per_gpu} tokens"]
    if actor.layout.recompute != "none":
        words.append(f"{actor.layout.recompute} recompute")
    if plan.job.config.model.offload:
        words.append("offload")
    return ", ".join(words)


def _engines(plan: TimedPlan) -> str:
    rollout = plan.job.config.rollout
    where = "colocated"
    if rollout.placement == "disaggregated":
        where = "dedicated"
    elif rollout.sleep:
        where = "sleeping"  # colocated, and asleep while training goes on
    cut = f"{rollout.engines} x TP{rollout.tensor_parallel_size}"
    return f"{cut} {where}, {rollout.gpu_memory_utilization:g}"


def _comparison(plans: tuple[TimedPlan, ...]) -> str:
    """The first against the second, by the four phases that differ most."""
    first = plans[0]
    rank, phase = first.memory.peak
    lines = [f"1. peak {phase.phase} on {rank.place}; {_waiting(first)}", *_balance(first)]
    if len(plans) > 1:
        other = _seconds(plans[1])
        differences = [
            (seconds - other.get(name, 0.0), name) for name, seconds in _seconds(first).items()
        ]
        differences.sort(key=lambda pair: -abs(pair[0]))
        named = [f"{name} {s:+.1f} s" for s, name in differences[:4] if abs(s) >= 0.05]
        lines.append(f"   against 2: {', '.join(named) or 'the same within 0.05 s a phase'}")
    return "\n".join(lines)


def _balance(plan: TimedPlan) -> list[str]:
    """How even the two sides of a step are; nothing where they are one after the other."""
    assert plan.time is not None, "a plan that fits has a time"
    if _in_turn(plan):
        return []
    job, schedule = plan.job, plan.time.schedule
    devices = f"{job.training_devices} devices train and generate"
    if not job.colocated:
        devices = f"{job.training_devices} devices train, {job.engine_ranks} generate"
    return [
        f"   {devices}: of a step the engines wait {schedule.engines_wait_s:.1f} s for training, "
        f"training waits {schedule.training_waits_s:.1f} s for samples; in turn a step would take "
        f"{plan.time.in_turn_s:.1f} s"
    ]


def _waiting(plan: TimedPlan) -> str:
    assert plan.time is not None, "a plan that fits has a time"
    updates = [phase for phase in plan.time.phases if phase.phase in UPDATE]
    total = sum(phase.total for phase in updates)
    bubble = sum(phase.parts.get("bubble", 0.0) for phase in updates) / total
    messages = sum(phase.parts.get("messages", 0.0) for phase in updates) / total
    return f"of the updates {bubble:.0%} waits in the pipeline and {messages:.0%} in messages"
