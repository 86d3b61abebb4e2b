"""What limits it: which phases take a step's time, and who waits for whom.

Invariant: seconds of a step are means of the last steps without what some steps have besides
(`OCCASIONAL`), which is told on its own; each second is in one group. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from rlhf3d.observability.metrics import STEP_TIME, phase_totals
from rlhf3d.observability.page.advice import TIME, advice
from rlhf3d.observability.page.findings import Finding, share
from rlhf3d.observability.page.limits import CUT_WATCH, EARLY_STEPS, EXPLAINED
from rlhf3d.observability.page.setup import Setup
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
OCCASIONAL = ("validate", "save_checkpoint")
"""Phases that only some steps have."""
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
CRITIC = ("values", "update_critic")
CRITIC_TIME = 0.2
"""Share of a step from which the value model must be worth it."""
NAMED = 0.03
"""Share of a step from which a group is worth naming."""
WAITS = 0.1
"""Share of a step that one side must wait for the other before it is said to."""


@dataclass(frozen=True)
class Occasional:
    """What a phase of `OCCASIONAL` took, in all training steps."""

    times: int
    total_s: float
    steps: int
    before: bool = False
    """Whether there was one before the first step, too, which is not counted."""

    @property
    def each_s(self) -> float:
        """Seconds of one."""
        return self.total_s / self.times

    @property
    def shared_s(self) -> float:
        """Seconds a step, shared out over all."""
        return self.total_s / self.steps

    @property
    def times_text(self) -> str:
        """How often."""
        before = " (and before the first)" if self.before else ""
        return f"in {self.times} of {self.steps} steps{before}"


def occasional(rows: Rows) -> dict[str, Occasional]:
    """Those that the run has had."""
    steps = training_rows(rows)
    found = {}
    for phase in OCCASIONAL:
        seconds = [value for value in values(steps, f"timing_s/{phase}") if value > 0]
        if seconds:
            before = any(row["step"] == 0 and number(row, f"timing_s/{phase}") for row in rows)
            found[phase] = Occasional(len(seconds), sum(seconds), len(steps), before)
    return found


def recent_phases(rows: Rows) -> dict[str, float]:
    """Mean seconds a step of each phase over the last steps, without the occasional ones."""
    last = recent(training_rows(rows))
    totals = phase_totals(last)
    return {phase: totals[phase] / len(last) for phase in totals if phase not in OCCASIONAL}


def step_seconds(rows: Rows) -> float | None:
    """Mean seconds of the last steps, without the occasional phases."""
    last = recent(training_rows(rows))
    mean = mean_of(last, STEP_TIME)
    if mean is None:
        return None
    besides = sum(sum(values(last, f"timing_s/{phase}")) for phase in OCCASIONAL)
    return mean - besides / len(last)


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


def bound(rows: Rows, setup: Setup | None = None) -> Finding:
    """Name what takes most of a step."""
    phases, step_s = recent_phases(rows), step_seconds(rows)
    if not phases or not step_s:
        return Finding("unknown", "No times yet", "The run has no timings of training steps.")
    besides = occasional(rows)
    text = f"{_step_text(phases, step_s, rows)} {_besides_text(besides)}".strip()
    groups = grouped(phases, step_s)
    shared = {phase: one.shared_s for phase, one in besides.items()}
    groups |= grouped(shared, sum(shared.values()))
    largest = max(groups, key=lambda name: groups[name])
    last = recent(training_rows(rows))
    if any(number(row, "async/overlap_share") is not None for row in last):
        text = f"{text} {_beside_text(last)}"
        waited = mean_of(last, "async/trainer_waited_s") or 0.0
        engines_waited = mean_of(last, "async/engines_waited_s") or 0.0
        if waited > WAITS * step_s and waited > engines_waited:
            hints = advice(TIME["generation"], setup, rows)
            return Finding("fact", TITLES["generation"], text, hints, "waits")
        if largest in ("generation", "scoring"):
            return Finding("fact", "Both sides keep up with each other", text, chart="waits")
    hints = advice(TIME[largest], setup, rows)
    if largest == "training":
        hints = f"{_critic_text(phases, step_s, rows, setup)} {hints}".strip()
    return Finding("fact", TITLES[largest], text, hints, "phases")


def _step_text(phases: Mapping[str, float], step_s: float, rows: Rows) -> str:
    parts = ", ".join(
        f"{LABELS.get(name, name)} {for_people(seconds)} = {share(seconds / step_s)}"
        for name, seconds in sorted(grouped(phases, step_s).items(), key=lambda item: -item[1])
        if seconds / step_s >= NAMED
    )
    phase = max(phases, key=lambda name: phases[name])
    steps = len(recent(training_rows(rows)))
    mean = [f"mean of the last {steps}"] if steps > 1 else []
    besides = ["without validation and checkpoints"] if occasional(rows) else []
    note = f" ({', '.join(mean + besides)})" if mean + besides else ""
    return (
        f"A step takes {for_people(step_s)}{note}: {parts}. Its longest phase is {phase}, "
        f"{for_people(phases[phase])} = {share(phases[phase] / step_s)}."
    )


def _besides_text(found: Mapping[str, Occasional]) -> str:
    names = {"validate": "validation", "save_checkpoint": "a checkpoint"}
    parts = [
        f"{names[phase]} {for_people(one.each_s)} {one.times_text}" for phase, one in found.items()
    ]
    return f"Besides, {' and '.join(parts)}." if parts else ""


def _beside_text(last: Rows) -> str:
    """Generation beside training: what counts is who waits."""
    trainer = mean_of(last, "async/trainer_waited_s") or 0.0
    engines = mean_of(last, "async/engines_waited_s") or 0.0
    hidden = mean_of(last, "async/overlap_share") or 0.0
    drawn = mean_of(last, "async/drawn_s")
    own = "" if drawn is None else f" and takes {for_people(drawn)} a step"
    return (
        f"Generation goes on beside training{own}; training hides {share(hidden)} of it: in a step "
        f"the trainer waits {for_people(trainer)} for samples, and the engines "
        f"{for_people(engines)} for the trainer."
    )


def _critic_text(
    phases: Mapping[str, float], step_s: float, rows: Rows, setup: Setup | None
) -> str:
    """Of a value model that costs much and explains little."""
    cost = sum(phases.get(phase, 0.0) for phase in CRITIC) / step_s
    steps = training_rows(rows)
    explained = mean_of(recent(steps), "critic/vf_explained_var")
    if len(steps) < EARLY_STEPS:
        # Its check has not settled yet whether it is of use.
        return ""
    if cost < CRITIC_TIME or explained is None or explained >= EXPLAINED:
        return ""
    few = ""
    if setup is not None and setup.completions_per_prompt < 4:
        few = f"; rollout.n is {setup.completions_per_prompt}: rather 4 or more"
    return (
        f"The value model ({' + '.join(CRITIC)}) takes {share(cost)} of a step and explains "
        f"{share(max(explained, 0.0))} of the returns' variance: consider an estimator without "
        f"one, which compares the completions of a prompt (algorithm.adv_estimator=grpo{few})."
    )


def wrote(rows: Rows) -> Finding:
    """What it writes, as far as figures say that; the answers themselves are below them."""
    last = recent(training_rows(rows))
    lengths = values(last, "response_length/mean")
    if not lengths:
        return Finding("unknown", "Nothing written yet", "The run has no completions of training.")
    parts = [f"Answers have {fmean(lengths):.0f} tokens on average"]
    cut, longest = (
        mean_of(last, f"response{name}") for name in ("/truncated_ratio", "_length/p90")
    )
    if longest is not None and (cut is None or cut <= CUT_WATCH):
        # With more cut off, nine of ten is the limit in most steps, whatever the mean over steps.
        parts.append(f"nine of ten at most {longest:.0f}")
    if cut is not None:
        parts.append(f"{share(cut)} are cut off at the limit")
    names = ("scored", "unparsable", "timeout", "error")
    outcomes = {name: sum(values(last, f"reward/outcome/{name}")) for name in names}
    total = sum(outcomes.values())
    text = f"{', '.join(parts)}."
    if total and outcomes["unparsable"]:
        text += f" {share(outcomes['unparsable'] / total)} hold no answer that can be read."
    title = f"Answers of {fmean(lengths):.0f} tokens"
    if cut is not None and cut > CUT_WATCH:
        title += f", {share(cut)} of them cut off"
    return Finding("fact", title, text, chart="samples")
