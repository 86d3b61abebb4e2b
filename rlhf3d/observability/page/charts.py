"""Which curves a page has, and their points.

Invariant: what is drawn is data: a chart's lines and words stand in `CHARTS`, and the page's script
draws any of them. A curve has at most `POINTS` points, whatever the length of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rlhf3d.observability.metrics import (
    STEP_TIME,
    Points,
    by_measure,
    keys_of,
    phase_seconds,
    validation_accuracy,
    validation_reward,
)
from rlhf3d.observability.page.learning import held_out, held_out_error
from rlhf3d.observability.page.limits import HEALTHY
from rlhf3d.observability.page.trends import Rows, number, running_means, training_rows, window

POINTS = 1000
"""A screen has no more columns for a chart; longer runs are drawn in means of consecutive steps."""
DIGITS = 4

Format = Literal["number", "share", "tokens", "seconds", "nats"]


@dataclass(frozen=True)
class Line:
    """One metric of a chart."""

    metric: str
    label: str
    highest: bool = False
    """Of steps drawn as one point the highest counts, not the mean: spikes must be seen."""
    over: tuple[str, ...] = ()
    """The metric is divided by the sum of these."""


@dataclass(frozen=True)
class Chart:
    """Curves over steps that share a scale."""

    id: str
    title: str
    help: str
    """What it is."""
    lines: tuple[Line, ...]
    format: Format = "number"
    healthy: str = ""
    """What is healthy of its first line, in words; filled in `CHARTS`."""
    limit: float | None = None
    """Where a check of `health` begins to warn about its first line; filled in `CHARTS`."""
    unit: str = ""
    lowest: float | None = 0.0
    """No value can be lower."""
    smooth: bool = True
    """Whether a running mean says something."""
    bypass: str = ""
    """What more there is to say where the engines' log-probs are the old ones."""
    one_update: str = ""
    """What there is to say instead of a limit where a batch is one update."""
    asynchronous: str = ""
    """What more there is to say where generation runs beside training."""
    about_groups: bool = False
    """Its limit is one for estimators that compare the completions of a prompt."""


_OLDER = (
    "Here the old policy is the one that wrote (bypass mode), which may be of an earlier version."
)
_ONE_UPDATE = (
    "This run makes one update a batch, of the policy that wrote it: nothing can be clipped."
)
_NOT_MOVED = "This run makes one update a batch, before which nothing has moved."
_OUTCOMES = tuple(f"reward/outcome/{name}" for name in ("scored", "unparsable", "timeout", "error"))

_CHARTS: tuple[Chart, ...] = (
    Chart(
        "reward",
        "Reward",
        "Mean score of a step's completions: the learning curve. It should rise, then level off.",
        (
            Line("critic/score/mean", "score"),
            Line("filter_groups/generated_score/mean", "score of all generated"),
        ),
        lowest=None,
    ),
    Chart(
        "kl",
        "KL to the reference",
        "How far the policy has gone from the model that it started from. It grows slowly.",
        (
            Line("actor/kl_loss", "KL in the loss"),
            Line("actor/reward_kl_penalty", "KL in the reward"),
        ),
        "nats",
        unit="nats per token",
        lowest=None,
    ),
    Chart(
        "entropy",
        "Entropy",
        "How open the choice of the next token is. It falls as the policy gets sure.",
        (Line("actor/entropy", "entropy"),),
        "nats",
        unit="nats per token",
    ),
    Chart(
        "length",
        "Response length",
        "Tokens of a completion: mean, and what nine of ten of a step have at most.",
        (
            Line("response_length/mean", "mean"),
            Line("response_length/p90", "nine of ten at most"),
            Line("response_length_drawn/mean", "mean of all generated"),
        ),
        "tokens",
        unit="tokens",
    ),
    Chart(
        "cut",
        "Cut off at the limit",
        "Share of completions that reach the length limit before their end.",
        (Line("response/truncated_ratio", "cut off"),),
        "share",
    ),
    Chart(
        "clip",
        "Clip share",
        "Share of tokens beyond the clip range, which no longer push the policy on.",
        (
            Line("actor/pg_clipfrac", "clip"),
            Line("actor/pg_clipfrac_lower", "dual clip"),
        ),
        "share",
        bypass=_OLDER,
        one_update=_ONE_UPDATE,
    ),
    Chart(
        "ppo_kl",
        "KL of an update",
        "How far a step's updates move the policy (estimator k1, which may be slightly negative).",
        (Line("actor/ppo_kl", "new to old policy"),),
        "nats",
        unit="nats per token",
        lowest=None,
        bypass=_OLDER,
        one_update=_NOT_MOVED,
    ),
    Chart(
        "mismatch",
        "Engine against trainer",
        "Mean difference between the probabilities that vLLM and Megatron give a sampled token.",
        (Line("training/rollout_probs_diff_mean", "mean difference"),),
    ),
    Chart(
        "mismatch_max",
        "Engine against trainer, worst token",
        "The largest such difference of a step.",
        (Line("training/rollout_probs_diff_max", "largest difference", highest=True),),
    ),
    Chart(
        "signal",
        "Groups that teach",
        "Share of prompts whose completions differ in score: only they teach a group-based "
        "estimator.",
        (
            Line("reward/mixed_groups_share", "groups with signal"),
            Line("filter_groups/kept_share", "groups kept"),
        ),
        "share",
        about_groups=True,
    ),
    Chart(
        "outcomes",
        "Completions without a score",
        "Share of completions with no readable answer, and of failed scorings.",
        (
            Line("reward/outcome/unparsable", "no readable answer", over=_OUTCOMES),
            Line("reward/outcome/timeout", "timeout", over=_OUTCOMES),
            Line("reward/outcome/error", "error", over=_OUTCOMES),
        ),
        "share",
    ),
    Chart(
        "grad_norm",
        "Gradient norm",
        "Of the complete model, before clipping (optim.clip_grad).",
        (
            Line("actor/grad_norm", "actor", highest=True),
            Line("critic/grad_norm", "critic", highest=True),
        ),
        unit="Euclidean norm",
    ),
    Chart(
        "critic",
        "Value model",
        "Share of the returns' variance that the values explain: 100 % is perfect, 0 no better "
        "than a constant.",
        (Line("critic/vf_explained_var", "explained variance"),),
        "share",
        lowest=None,
    ),
    Chart(
        "lr",
        "Learning rate",
        "Of each step.",
        (Line("actor/lr", "actor"), Line("critic/lr", "critic")),
        smooth=False,
    ),
    Chart(
        "staleness",
        "Age of samples",
        "Versions between the policy that wrote a trajectory (its oldest part) and the one being "
        "trained.",
        (
            Line("training/off_policy/trajectory_staleness_worst/mean", "mean"),
            Line("training/off_policy/trajectory_staleness_worst/max", "oldest", highest=True),
        ),
        unit="versions",
        smooth=False,
    ),
    Chart(
        "off_policy_kl",
        "Distance to the policy that wrote",
        "KL between the policy that wrote older tokens and the one being trained.",
        (Line("training/off_policy/kl_k3", "KL"),),
        "nats",
        unit="nats per token",
    ),
    Chart(
        "waits",
        "Who waits for whom",
        "Generation beside training: seconds that the trainer waits for samples, and the engines "
        "for the trainer.",
        (
            Line("async/trainer_waited_s", "trainer waits"),
            Line("async/engines_waited_s", "engines wait"),
        ),
        "seconds",
    ),
    Chart(
        "throughput",
        "Tokens per second",
        "Prompt and response tokens per second of the complete step and device (on CPUs: rank); "
        "response tokens per second of generation.",
        (
            Line("perf/throughput", "step, per device"),
            Line("perf/generate_tokens_per_s", "generation"),
        ),
        asynchronous="Generation runs beside training here, and shares the machine with it.",
    ),
    Chart(
        "memory",
        "Memory",
        "The most that any training rank has had so far, and what is in use on the driver's node.",
        (
            Line("perf/rank_memory_gib", "training rank, peak"),
            Line("perf/host_memory_gib", "host in use", highest=True),
        ),
        unit="GiB",
        smooth=False,
    ),
    Chart(
        "step_s",
        "Seconds per step",
        "Wall-clock time, with validation and checkpoints; the verdict's time of a step and the "
        "table below leave these out.",
        (Line(STEP_TIME, "step"),),
        "seconds",
    ),
)


def _with_limit(chart: Chart) -> Chart:
    healthy = HEALTHY.get(chart.lines[0].metric)
    if healthy is None:
        return chart
    return replace(chart, healthy=f"Healthy: {healthy.words}.", limit=healthy.line)


CHARTS = tuple(map(_with_limit, _CHARTS))
"""In the order of the page."""


@dataclass(frozen=True)
class Curve:
    """Points of one line of one run."""

    label: str
    steps: Sequence[int]
    raw: Sequence[float | None]
    mean: Sequence[float | None] = field(default_factory=list)
    """Over the last steps up to each; empty where each point is a measurement of its own."""
    now: float | None = None
    """The last of the means."""
    low: Sequence[float | None] = field(default_factory=list)
    """One standard error around the mean, or around the point."""
    high: Sequence[float | None] = field(default_factory=list)


def stride(steps: int) -> int:
    """Consecutive steps that are one point of a curve."""
    return max(1, math.ceil(steps / POINTS))


def curves(chart: Chart, rows: Rows) -> list[Curve]:
    """Those lines of a chart that the run has measured."""
    steps = training_rows(rows)
    found = []
    for line in chart.lines:
        measured = [_value(row, line) for row in steps]
        if any(value is not None for value in measured):
            found.append(_curve(chart, line, [row["step"] for row in steps], measured))
    return found


def _value(row: Mapping[str, Any], line: Line) -> float | None:
    value = number(row, line.metric)
    if value is None or not line.over:
        return value
    total = sum(number(row, name) or 0.0 for name in line.over)
    return value / total if total else None


def _curve(
    chart: Chart, line: Line, steps: Sequence[int], measured: Sequence[float | None]
) -> Curve:
    mean, error = running_means(measured, window(len(steps)))
    series = np.array([math.nan if value is None else value for value in measured])
    places = list(_places(len(steps)))
    ends = [end - 1 for _, end in places]
    gather = np.fmax.reduce if line.highest else _nanmean
    shown = [steps[end] for end in ends]
    raw = rounded(gather(series[start:end]) for start, end in places)
    if not chart.smooth:
        return Curve(line.label, shown, raw)
    low, high = possible(mean - error, mean + error, chart.lowest, chart.format)
    means = rounded(mean[ends])
    return Curve(line.label, shown, raw, means, means[-1], rounded(low[ends]), rounded(high[ends]))


def possible(low: Any, high: Any, lowest: float | None, format_: Format) -> tuple[Any, Any]:
    """Ends of intervals, without what no value can be."""
    most = 1.0 if format_ == "share" else math.inf
    least = -math.inf if lowest is None else lowest
    return np.maximum(low, least), np.minimum(high, most)


def _places(count: int) -> Iterator[tuple[int, int]]:
    """First and end of each stretch that is one point."""
    size = stride(count)
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _nanmean(series: Any) -> float:
    known = series[np.isfinite(series)]
    return float(known.mean()) if len(known) else math.nan


def rounded(series: Any) -> list[float | None]:
    """With as many digits as a curve shows; None where there is no number."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in series]


def held_out_curves(rows: Rows) -> tuple[list[Curve], Format]:
    """Held-out accuracy (else the reward model's score) by measure, with one standard error."""
    main = held_out(rows)
    if main is None:
        return [], "number"
    read = validation_accuracy if main.percent else validation_reward
    format_: Format = "share" if main.percent else "number"
    found = by_measure(rows, read)
    return [_held_out_curve(*key, points, format_) for key, points in found.items()], format_


def _held_out_curve(source: str, measure: str, points: Points, format_: Format) -> Curve:
    known = np.array([value for _, value in points])
    errors = np.array([held_out_error(row, source, measure) for row, _ in points])
    lowest = 0.0 if format_ == "share" else None
    low, high = possible(known - errors, known + errors, lowest, format_)
    return Curve(
        f"{source} {measure}",
        [row["step"] for row, _ in points],
        rounded(known),
        low=rounded(np.where(np.isfinite(errors), low, math.nan)),
        high=rounded(np.where(np.isfinite(errors), high, math.nan)),
    )


@dataclass(frozen=True)
class Stack:
    """Amounts that add up, at each step."""

    steps: Sequence[int]
    parts: Mapping[str, Sequence[float | None]]


def phase_stack(rows: Rows) -> Stack:
    """Seconds of each phase; of long runs the means of consecutive steps."""
    found = [phase_seconds(row) for row in rows]
    places = list(_places(len(rows)))
    parts = {}
    for phase in keys_of(found):
        series = np.array([seconds.get(phase, 0.0) for seconds in found])
        parts[phase] = rounded(series[start:end].mean() for start, end in places)
    return Stack([rows[end - 1]["step"] for _, end in places], parts)
