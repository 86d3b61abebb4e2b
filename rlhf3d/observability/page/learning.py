"""Is it learning: the rewards of training, and the accuracy on held-out prompts.

Invariant: a change is called one only where its standard error allows it. Pure: rows only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any, Literal

from rlhf3d.observability.metrics import keys_of, validation_accuracy, validation_reward
from rlhf3d.observability.page.advice import NEARER, advice
from rlhf3d.observability.page.findings import Finding
from rlhf3d.observability.page.limits import EARLY_STEPS
from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.page.trends import (
    Change,
    Mean,
    Rows,
    change,
    difference,
    mean_with_error,
    number,
    recent,
    training_rows,
    values,
)

SURE = 3.0
"""Standard errors that a change of the reward must have: steps that follow one another are alike,
and so the error is a bit too small; with 2, one flat run in ten would be called learning."""
SURE_OF_LOSS = 4.0
"""The same of a fall from the best: the best of many windows is high by chance as well."""
SURE_HELD_OUT = 2.0
"""The same of held-out accuracy, where the prompts are independent (95 %)."""
FEWEST_BEFORE = 4
"""Steps before the last from which a scatter is taken."""
LOST = 0.5
"""Share of what was gained that must be lost before a run is said to lose it."""
SOLVED = 0.95
"""Share of the best score seen; a run that begins there has little to learn."""

Trend = Literal["rises", "falls", "lost", "flat", "unknown"]
"""lost: it had risen, and has lost most of that."""


@dataclass(frozen=True)
class HeldOut:
    """One measure of held-out prompts, over all data sources, in order of steps."""

    title: str
    points: tuple[tuple[int, Mean], ...]
    percent: bool
    prompts: float | None
    """Of the last one; None where that is not recorded."""

    def text(self, mean: Mean) -> str:
        """A value for people."""
        if not self.percent:
            return str(mean)
        error = f" ± {100 * mean.error:.1f}" if math.isfinite(mean.error) else ""
        return f"{100 * mean.value:.1f}{error} %"


def reward_name(rows: Rows) -> str:
    """The learning curve: with dynamic sampling that of all that was generated."""
    generated = "filter_groups/generated_score/mean"
    return generated if any(generated in row for row in rows) else "critic/score/mean"


def binomial_standard_error(accuracy: float, prompts: float) -> float:
    """Return sqrt(p (1 - p) / n).

    An upper bound for answers sampled several times a prompt, as n counts prompts.
    """
    return math.sqrt(accuracy * (1.0 - accuracy) / prompts)


def held_out(rows: Rows) -> HeldOut | None:
    """Greedy accuracy where there is one, else the first measure there is; None without any."""
    for read, percent, what in (
        (validation_accuracy, True, "accuracy"),
        (validation_reward, False, "reward model's score"),
    ):
        found = [(row, read(row)) for row in rows]
        keys = keys_of(values for _, values in found)
        measures = [measure for _, measure in keys]
        if measures:
            chosen = "greedy" if "greedy" in measures else measures[0]
            points = [(row["step"], _over_sources(row, values, chosen)) for row, values in found]
            known = tuple((step, mean) for step, mean in points if mean is not None)
            prompts = _num_prompts(rows, {source for source, _ in keys})
            return HeldOut(f"held-out {what} ({chosen})", known, percent, prompts)
    return None


def _num_prompts(rows: Rows, sources: Iterable[str]) -> float | None:
    """Over all data sources."""
    counts = [values(rows, f"val-aux/{source}/num_prompts")[-1:] for source in sources]
    return math.fsum(chain.from_iterable(counts)) or None


def _over_sources(
    row: Mapping[str, Any], values: Mapping[tuple[str, str], float], chosen: str
) -> Mean | None:
    """The mean over the data sources that have the measure."""
    found = [
        (value, held_out_error(row, source, measure))
        for (source, measure), value in values.items()
        if measure == chosen
    ]
    if not found:
        return None
    error = math.hypot(*(error for _, error in found)) / len(found)
    return Mean(fmean(value for value, _ in found), error)


def held_out_error(row: Mapping[str, Any], source: str, measure: str) -> float:
    """One standard error of an accuracy, or of the reward model's score; infinite if not known."""
    accuracy = validation_accuracy(row).get((source, measure))
    prompts = number(row, f"val-aux/{source}/num_prompts")
    if accuracy is None:
        error = number(row, f"val-aux/{source}/reward_model/{measure}/se")
        return math.inf if error is None else error
    return binomial_standard_error(accuracy, prompts) if prompts else math.inf


def is_sure(gain: Mean, errors: float) -> bool:
    """Whether a difference is above 0 by so many standard errors."""
    # What rounding makes of equal values is no change.
    return gain.value > max(errors * gain.error, 1e-9)


def reward_trend(found: Change | None) -> Trend:
    """What the training reward does."""
    if found is None:
        return "unknown"
    gained = found.best.value - found.first.value
    return _trend(found.gain, found.loss, gained, SURE, SURE_OF_LOSS)


def held_out_trend(found: HeldOut | None) -> Trend:
    """What held-out accuracy does, from the first validation to the last."""
    if found is None or len(found.points) < 2:
        return "unknown"
    first, last, best = found.points[0][1], found.points[-1][1], _best(found)[1]
    gain, loss = difference(last, first), difference(best, last)
    return _trend(gain, loss, best.value - first.value, SURE_HELD_OUT, SURE_HELD_OUT)


def _trend(gain: Mean, loss: Mean, gained: float, sure: float, sure_of_loss: float) -> Trend:
    """By the gain since the start and the loss since the best, which had `gained` so much."""
    if is_sure(Mean(-gain.value, gain.error), sure):
        return "falls"
    if is_sure(loss, sure_of_loss) and loss.value > LOST * gained:
        return "lost"
    return "rises" if is_sure(gain, sure) else "flat"


def _best(found: HeldOut) -> tuple[int, Mean]:
    return max(found.points, key=lambda point: point[1].value)


def learning(rows: Rows, setup: Setup | None = None) -> Finding:
    """Answer the question from all rows of a run."""
    steps = training_rows(rows)
    if not steps:
        return Finding("unknown", "Nothing trained yet", "The run has no training step yet.")
    name = reward_name(steps)
    reward, accuracy = change(steps, name), held_out(rows)
    trend, of_held_out = reward_trend(reward), held_out_trend(accuracy)
    parts = (_reward_text(reward, len(steps)), _drop_text(steps, name), _held_out_text(accuracy))
    text = " ".join(part for part in parts if part)
    if of_held_out in ("rises", "falls", "lost"):
        return _by_held_out(of_held_out, trend, text, accuracy, advice(NEARER, setup))
    if trend == "rises" and of_held_out == "flat":
        return Finding(
            "watch",
            "The reward rises, held-out accuracy does not (yet)",
            text,
            "Validate on more prompts to see smaller changes. Read the answers: a reward can rise "
            "by what it should not pay for.",
            "held_out",
        )
    return _by_reward(steps, trend, reward, text, advice(NEARER, setup))


def _by_held_out(
    of_held_out: Trend, reward: Trend, text: str, found: HeldOut | None, nearer: str
) -> Finding:
    assert found is not None
    step, best = _best(found)
    if of_held_out == "rises" and reward in ("falls", "lost"):
        return Finding(
            "watch",
            "It has learned, and the reward is falling again",
            text,
            "Look at KL, entropy and gradient norm where the fall begins; try a lower learning "
            "rate.",
            "reward",
        )
    if of_held_out == "rises":
        return Finding("good", "It is learning", text, chart="held_out")
    if of_held_out == "lost":
        return Finding(
            "watch",
            f"It was better at step {step}",
            f"{text} The best was {found.text(best)} at step {step}.",
            "Use the checkpoint from there (trainer.keep_best keeps it). Look at KL and entropy "
            "after it.",
            "held_out",
        )
    what = nearer
    if reward == "rises":
        text += " The training reward rises meanwhile: it pays for something else than that."
        what = "Read the answers below, first to last, and correct what the reward pays for."
    return Finding("bad", "It gets worse on held-out prompts", text, what, "held_out")


def _by_reward(steps: Rows, trend: Trend, reward: Change | None, text: str, nearer: str) -> Finding:
    if trend == "rises":
        return Finding("good", "It is learning", text, chart="reward")
    if trend == "lost":
        assert reward is not None
        return Finding(
            "bad",
            "It had learned, and lost it",
            f"{text} At its best, up to step {reward.best_step}, the mean was {reward.best}.",
            f"Go back to a checkpoint before the fall, and stay nearer to what worked: {nearer}",
            "reward",
        )
    if trend == "falls":
        return Finding(
            "bad",
            "The reward falls",
            text,
            "Check the reward function on the answers below; try a lower learning rate.",
            "reward",
        )
    if reward is None or len(steps) < EARLY_STEPS:
        return Finding("unknown", "Too early to say", text, chart="reward")
    highest = max((number(row, "critic/score/max") or 0.0 for row in steps), default=0.0)
    if highest > 0 and reward.first.value >= SOLVED * highest:
        return Finding(
            "watch",
            "There is little left to learn",
            f"{text} That is near the best score there is, since the start.",
            "Use harder prompts.",
            "reward",
        )
    return Finding(
        "watch",
        "No learning to be seen",
        text,
        "Check the reward function on the answers below. If they are scored rightly: easier "
        "prompts, more completions a prompt (rollout.n), a higher learning rate, or more steps.",
        "reward",
    )


def _reward_text(found: Change | None, steps: int) -> str:
    if found is None:
        trained = "1 training step is" if steps == 1 else f"{steps} training steps are"
        return f"{trained} too few to see a trend of the reward."
    return (
        f"Reward {found.first} in the first {found.steps} steps and {found.last} in the last "
        f"{found.steps}: {found.gain.value:+.3g} ± {found.gain.error:.2g}."
    )


def _drop_text(steps: Rows, name: str) -> str:
    """Of a last step whose reward lies below what steps before it scatter by."""
    *before, last = values(recent(steps), name) or [0.0]
    if len(before) < FEWEST_BEFORE:
        return ""
    mean = mean_with_error(before)
    # A single step scatters by the steps' deviation; their mean's own error is added.
    drop = Mean(mean.value - last, mean.error * math.sqrt(len(before) + 1))
    return f"The last step's alone is {last:.3g}." if is_sure(drop, SURE_OF_LOSS) else ""


def _held_out_text(found: HeldOut | None) -> str:
    if found is None:
        return "The run has not validated on held-out prompts."
    (first_step, first), (last_step, last) = found.points[0], found.points[-1]
    title = found.title[0].upper() + found.title[1:]
    if found.prompts is not None:
        title = f"{title.removesuffix(')')}, {found.prompts:.0f} prompts)"
    if len(found.points) == 1:
        return f"{title} {found.text(first)} at step {first_step}; once is no trend."
    return (
        f"{title} {found.text(first)} at step {first_step}, {found.text(last)} at step {last_step}."
    )
