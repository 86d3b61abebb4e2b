"""Where a profiled step lost time, in words.

Invariant: every figure is one of `summary.py`, and each is told with what it is a share of. Advice
is given once, and only where the time it may save is a part of the step worth it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from rlhf3d.observability.profile.summary import (
    RankShares,
    engine_shares,
    rank_shares,
    step_shares,
)
from rlhf3d.observability.profile.timeline import Timeline
from rlhf3d.units import NS

NAMED = 0.02
"""Share of the step from which something is worth naming."""
EACH = 4
"""So many stages or engines are told one by one."""
MORE = 0.1
"""Share of a phase that a rank waits beyond what equal passes explain before it is said."""
MATTERS = 0.05
"""Share of the step that ranks wait from which advice is worth it."""
UNEQUAL = 1.5
"""The largest micro-batch has so many times the tokens of the smallest."""
SIZE_KEYS = {
    "actor": "actor.ppo_micro_batch_size_per_gpu (actor.ppo_max_token_len_per_gpu with "
    "actor.use_dynamic_bsz)",
    "critic": "critic.ppo_micro_batch_size_per_gpu (critic.ppo_max_token_len_per_gpu with "
    "critic.use_dynamic_bsz)",
    "reward": "reward_model.micro_batch_size_per_gpu",
}
"""Of a worker group."""


def in_words(timeline: Timeline) -> list[str]:
    """Where the step's time went and what waited, a sentence or two each."""
    return [*_step_words(timeline), *_rank_words(timeline), *_engine_words(timeline)]


def _step_words(timeline: Timeline) -> list[str]:
    shares = step_shares(timeline)
    both = f" (both at once: {_share(shares.both)})" if shares.engines and shares.training else ""
    text = (
        f"Of the {timeline.ended / NS:.2f} s of step {timeline.step}, at least one training rank "
        f"computes in {_share(shares.training)}, at least one engine takes steps in "
        f"{_share(shares.engines)}{both}, processes only exchange weights or gradients in "
        f"{_share(shares.exchange)}, and nobody is at work in {_share(shares.nobody)}"
    )
    places = [f"{name} {_share(part)}" for name, part in shares.nobody_in[:3] if part >= NAMED]
    return [f"{text} ({', '.join(places)})." if places else f"{text}."]


def _rank_words(timeline: Timeline) -> list[str]:
    """A line for each phase, then for each group of workers what its pipeline costs."""
    by_phase: dict[tuple[str, str], list[RankShares]] = {}
    by_group: dict[str, list[list[RankShares]]] = {}
    for one in rank_shares(timeline):
        by_phase.setdefault((one.phase, one.process.group), []).append(one)
    for (_, group), ranks in by_phase.items():
        by_group.setdefault(group, []).append(ranks)
    lines = [_phase_words(ranks) for ranks in by_phase.values()]
    for group, phases in by_group.items():
        if phases[0][0].process.stages > 1:
            lines += _pipeline_words(phases)
            lines += _advice(timeline, group, phases)
    return lines


def _phase_words(ranks: Sequence[RankShares]) -> str:
    head = f"{ranks[0].phase} ({max(one.seconds for one in ranks):.2f} s)"
    collectives = _range(one.collective for one in ranks)
    if ranks[0].process.stages == 1:
        return (
            f"{head}: ranks compute {_range(one.work for one in ranks)} of it and are in "
            f"collectives with other replicas {collectives}, over {_micro_batches(ranks)}."
        )
    text = f"{head}: {_waits(ranks)}"
    if any(one.collective >= NAMED for one in ranks):
        text += f"; collectives take {collectives}"
    worst = max(ranks, key=lambda one: one.wait - one.bubble)
    if worst.wait - worst.bubble > MORE:
        text += (
            f". {worst.process.name} waits {_share(worst.wait)}, where equally long passes would "
            f"make it {_share(worst.bubble)}"
        )
    return f"{text}."


def _waits(ranks: Sequence[RankShares]) -> str:
    """Of each stage, or of the ends where there are many."""
    by_stage: dict[int, list[float]] = {}
    for one in ranks:
        by_stage.setdefault(one.process.stage, []).append(one.wait)
    if len(by_stage) > EACH:
        least, most = (pick(ranks, key=lambda one: one.wait) for pick in (min, max))
        return (
            f"ranks wait for other stages {_share(least.wait)} ({least.process.name}) to "
            f"{_share(most.wait)} ({most.process.name}) of it"
        )
    (first, waits), *others = by_stage.items()
    text = f"stage {first} waits for other stages {_range(waits)} of it"
    return ", ".join([text, *(f"stage {stage} waits {_range(waits)}" for stage, waits in others)])


def _pipeline_words(phases: Sequence[Sequence[RankShares]]) -> list[str]:
    """What a pipeline waits even so; phases that are alike are told once."""
    found: dict[str, list[RankShares]] = {}
    for ranks in phases:
        stages, chunks = ranks[0].process.stages, ranks[0].process.chunks
        parts = f" with {chunks} parts of the model on each" if chunks > 1 else ""
        shape = f"a pipeline of {stages} stages{parts} and {_micro_batches(ranks)}"
        found.setdefault(shape, []).extend(ranks)
    return [_bubble_words(shape, ranks) for shape, ranks in found.items()]


def _bubble_words(shape: str, ranks: Sequence[RankShares]) -> str:
    updates = [one.bubble for one in ranks if one.updates]
    forward = [one.bubble for one in ranks if not one.updates]
    parts = []
    if updates:
        parts.append(f"idles {_share(fmean(updates))} of an update")
    if forward:
        parts.append(
            f"waits {_share(max(forward))} (last stage) and {_share(min(forward))} (first stage) "
            "of a phase with forward passes only"
        )
    text = f"Even when all passes take equally long, {shape} {'; it '.join(parts)}"
    return f"{text}. {unequal}" if (unequal := _unequal(ranks)) else f"{text}."


def _unequal(ranks: Sequence[RankShares]) -> str:
    """Which micro-batches are far from equal."""
    sizes = []
    for one in ranks:
        sizes += [(tokens, number, one.process.name) for number, tokens in one.tokens.items()]
    if not sizes:
        return ""
    (least, number, name), (most, *_) = min(sizes), max(sizes)
    if most < UNEQUAL * least:
        return ""
    return (
        f"Here they do not: micro-batches have {least} (number {number} of {name}) to {most} "
        "tokens."
    )


def _advice(timeline: Timeline, group: str, phases: Sequence[Sequence[RankShares]]) -> list[str]:
    waited = sum(map(_mean_wait_s, phases))
    share = waited * NS / max(1, timeline.ended)
    if share < MATTERS or group not in SIZE_KEYS:
        return []
    return [
        f"On average a rank of the {group} waits for other stages in {_share(share)} of the step "
        f"({waited:.1f} s). Smaller and so more micro-batches make that less, as long as passes "
        f"stay efficient: {SIZE_KEYS[group]}."
    ]


def _mean_wait_s(ranks: Sequence[RankShares]) -> float:
    return fmean(one.wait * one.seconds for one in ranks)


def _micro_batches(ranks: Sequence[RankShares]) -> str:
    count = fmean(one.micro_batches for one in ranks)
    return f"{count:.3g} micro-batch{'' if count == 1 else 'es'}"


def _engine_words(timeline: Timeline) -> list[str]:
    found, engines = [], engine_shares(timeline)
    for one in engines[:EACH]:
        text = (
            f"{one.name.capitalize()} takes steps in {_share(one.stepping)} of the step, for "
            f"{one.requests} requests, {one.most} at once"
        )
        if one.first_token_s is not None:
            text += f"; the first token of one comes after {one.first_token_s:.2f} s on average"
        if one.few_s * NS >= NAMED * timeline.ended:
            text += f"; the last {one.few_s:.2f} s are for fewer than a quarter of them"
        found.append(f"{text}.")
    if len(engines) > EACH:
        found.append(f"{len(engines) - EACH} more engines are in the file.")
    return found


def _range(values: Iterable[float]) -> str:
    """The ends, or the one value where they are alike."""
    ordered = sorted(values)
    low, high = (f"{100 * value:.0f}" for value in (ordered[0], ordered[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
