"""`rlhf3d samples`: the generations of a run's step, or of an evaluation, with their scores.

Invariant: what is shown is a selection in the order written, and says how much it left out; text that a model wrote
reaches the terminal without control characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from rlhf3d.evaluation.records import GENERATIONS_FILE, read_generations
from rlhf3d.observability.samples import (
    SAMPLES_DIR,
    Kind,
    Sample,
    read_samples,
    sample_steps,
    samples_path,
)

KINDS: tuple[Kind, ...] = ("train", "greedy", "sampled")


@dataclass(frozen=True)
class Filter:
    """Which samples to show; several conditions all hold."""

    wrong: bool = False
    """Scored below 1, with an answer."""
    right: bool = False
    unparsable: bool = False
    failed: bool = False
    """Timeout or error."""
    truncated: bool = False
    """Cut off at the longest completion."""
    contains: str = ""
    """Text in prompt or response, whatever its case."""

    def keeps(self, sample: Sample) -> bool:
        """Whether a sample is shown."""
        conditions = (
            (self.wrong, sample.outcome == "scored" and sample.score < 1.0),
            (self.right, sample.outcome == "scored" and sample.score >= 1.0),
            (self.unparsable, sample.outcome == "unparsable"),
            (self.failed, sample.outcome in ("timeout", "error")),
            (self.truncated, sample.finish_reason == "length"),
            (
                bool(self.contains),
                self.contains.lower() in f"{sample.prompt}\n{sample.response}".lower(),
            ),
        )
        return all(holds for asked, holds in conditions if asked)


def load(folder: Path, step: int | None, kind: str | None) -> tuple[str, list[Sample]]:
    """What the samples are and all of them: of a run's `step` (null: the last) and `kind`, or of an evaluation.

    `kind` null is train of a run and everything of an evaluation. ValueError where there is none.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kind {kind}: must be one of {', '.join(KINDS)}")
    if (folder / GENERATIONS_FILE).is_file():
        if step is not None:
            raise ValueError(f"--step {step}: {folder} is an evaluation, which has no steps")
        found = [g for g in read_generations(folder, repair=False) if kind in (None, g.mode)]
        shown = [
            Sample(
                g.prompt,
                g.response,
                g.ground_truth,
                g.score,
                g.outcome,
                g.length,
                g.finish_reason,
                0,
            )
            for g in found
        ]
        return f"{folder} {kind or 'all'}", shown
    chosen: Kind = next((k for k in KINDS if k == kind), "train")
    steps = sample_steps(folder, chosen)
    if not steps:
        other = ", ".join(k for k in KINDS if sample_steps(folder, k)) or "none"
        raise ValueError(
            f"{folder}: no {chosen} samples in {SAMPLES_DIR}/ (kinds there: {other}); name a run's folder"
        )
    if step is not None and step not in steps:
        raise ValueError(f"--step {step}: {chosen} samples are there for {_ranges(steps)}")
    step = steps[-1] if step is None else step
    return f"{folder} {chosen} step {step}", read_samples(samples_path(folder, step, chosen))


def render(title: str, samples: Sequence[Sample], wanted: Filter, limit: int) -> RenderableType:
    """The first `limit` samples that `wanted` keeps, in full."""
    kept = [sample for sample in samples if wanted.keeps(sample)]
    parts: list[RenderableType] = [part for sample in kept[:limit] for part in _sample(sample)]
    parts.append(
        Text(
            f"{title}: {min(limit, len(kept))} of {len(kept)} shown, {len(samples)} in all",
            style="bold",
        )
    )
    return Group(*parts)


def _sample(sample: Sample) -> list[RenderableType]:
    colour = "green" if sample.score >= 1.0 else "yellow" if sample.outcome == "scored" else "red"
    verdict = f"{sample.outcome}, score {sample.mark}, wanted {clean(sample.ground_truth)}"
    cut = ", cut off" if sample.finish_reason == "length" else ""
    return [
        Text(clean(sample.prompt), style="cyan"),
        Text(clean(sample.response)),
        Text(f"— {verdict}; {sample.length} tokens{cut}", style=colour),
        Text(""),
    ]


def clean(text: object) -> str:
    """Text as it stands, line breaks kept, control characters shown as ·."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else "·" for c in str(text)
    )


def _ranges(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[-10:]))
    return shown if len(steps) <= 10 else f"… {shown}"
