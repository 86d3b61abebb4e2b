"""What limits it: which phases take a step's time, and who waits for whom.

Invariant: seconds are means of the last steps, each second in one group. Pure: rows only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean

from rlhf3d.observability.metrics import STEP_TIME, phase_seconds
from rlhf3d.observability.page.findings import Finding, share
from rlhf3d.observability.page.trends import Rows, mean_of, number, recent, training_rows, values

GROUPS = {
    "generation": ("generate",),
    "scoring": ("score",),
    "training": ("old_logprobs", "ref_logprobs", "values", "update_critic", "update_actor"),
    "weight sync": ("sync_weights",),
    "validation": ("validate",),
    "checkpoints": ("save_checkpoint",),
}
"""Phases by what one would change about them; all others are `other`."""
ADVICE = {
    "generation": "More engines, a larger rollout.max_num_seqs, shorter completions, or "
    "generation beside training (rollout.max_staleness).",
    "scoring": "More reward.workers, or a faster reward function.",
    "training": "Larger micro-batches, packed sequences (use_dynamic_bsz), another layout "
    "(`rlhf3d plan CONFIG --search`), or fewer epochs a batch.",
    "weight sync": "`rlhf3d reshard CONFIG` shows where the bytes go.",
    "validation": "A larger trainer.test_freq, or fewer held-out prompts (data.val_max_samples).",
    "checkpoints": "A larger trainer.save_freq, or trainer.async_save.",
    "other": "What lies between the phases: see logs/driver.log.",
}
TITLES = {
    "generation": "Generation limits it",
    "scoring": "Scoring limits it",
    "training": "Training limits it",
    "weight sync": "The weight sync limits it",
    "validation": "Validation limits it",
    "checkpoints": "Checkpoints limit it",
    "other": "Time between the phases limits it",
}
LABELS = {"training": "training (log-probs, values, updates)", "other": "between the phases"}
"""Of groups whose names do not say what is in them."""
NAMED = 0.03
"""Share of a step from which a group is worth naming."""
WAITS = 0.1
"""Share of a step that one side must wait for the other before it is said to."""


def recent_phases(rows: Rows) -> dict[str, float]:
    """Mean seconds a step of each phase over the last steps; what does not run each step is shared
    out over all.
    """
    last = recent(training_rows(rows))
    totals: Counter[str] = Counter()
    for row in last:
        totals.update(phase_seconds(row))
    return {phase: seconds / len(last) for phase, seconds in totals.items()}


def step_seconds(rows: Rows) -> float | None:
    """Mean seconds of the last steps."""
    return mean_of(recent(training_rows(rows)), STEP_TIME)


def grouped(phases: Mapping[str, float], step_s: float) -> dict[str, float]:
    """Seconds of each group, and of what is in none."""
    found = {}
    for name, members in GROUPS.items():
        found[name] = sum(phases.get(phase, 0.0) for phase in members)
    found["other"] = max(0.0, step_s - sum(found.values()))
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def for_people(seconds: float) -> str:
    """Seconds with the digits that count."""
    return f"{seconds:.1f} s" if seconds >= 1 or seconds == 0 else f"{seconds:.2g} s"


def bound(rows: Rows) -> Finding:
    """Name what takes most of a step."""
    phases, step_s = recent_phases(rows), step_seconds(rows)
    if not phases or not step_s:
        return Finding("unknown", "No times yet", "The run has no timings of training steps.")
    groups = grouped(phases, step_s)
    largest = max(groups, key=lambda name: groups[name])
    parts = ", ".join(
        f"{LABELS.get(name, name)} {for_people(seconds)} = {share(seconds / step_s)}"
        for name, seconds in sorted(groups.items(), key=lambda item: -item[1])
        if seconds / step_s >= NAMED
    )
    text = f"A step takes {for_people(step_s)}: {parts}."
    last = recent(training_rows(rows))
    if any(number(row, "async/overlap_share") is not None for row in last):
        return _beside(last, step_s, text, largest)
    return Finding("fact", TITLES[largest], text, ADVICE[largest], chart="phases")


def _beside(last: Rows, step_s: float, text: str, largest: str) -> Finding:
    """Generation beside training: what counts is who waits."""
    trainer = mean_of(last, "async/trainer_waited_s") or 0.0
    engines = mean_of(last, "async/engines_waited_s") or 0.0
    hidden = mean_of(last, "async/overlap_share") or 0.0
    waits = [for_people(seconds) for seconds in (trainer, engines)]
    text = (
        f"{text} Generation goes on beside training, which hides {share(hidden)} of it; in a step "
        f"the trainer waits {waits[0]} for samples, and the engines {waits[1]} for the trainer."
    )
    if trainer > WAITS * step_s and trainer > engines:
        return Finding("fact", TITLES["generation"], text, ADVICE["generation"], "waits")
    if largest not in ("generation", "scoring"):
        return Finding("fact", TITLES[largest], text, ADVICE[largest], "phases")
    return Finding("fact", "Both sides keep up with each other", text, chart="waits")


def wrote(rows: Rows) -> Finding:
    """What it writes, as far as figures say that; the answers themselves are below them."""
    last = recent(training_rows(rows))
    lengths = values(last, "response_length/mean")
    if not lengths:
        return Finding("unknown", "Nothing written yet", "The run has no completions of training.")
    parts = [f"Answers have {fmean(lengths):.0f} tokens on average"]
    if (longest := mean_of(last, "response_length/p90")) is not None:
        parts.append(f"nine of ten at most {longest:.0f}")
    if (cut := mean_of(last, "response/truncated_ratio")) is not None:
        parts.append(f"{share(cut)} are cut off at the limit")
    names = ("scored", "unparsable", "timeout", "error")
    outcomes = {name: sum(values(last, f"reward/outcome/{name}")) for name in names}
    total = sum(outcomes.values())
    text = f"{', '.join(parts)}."
    if total and outcomes["unparsable"]:
        text += f" {share(outcomes['unparsable'] / total)} hold no answer that can be read."
    return Finding("fact", f"Answers of {fmean(lengths):.0f} tokens", text, chart="samples")
