"""`rlhf3d samples`: the generations of a run's step, or of an evaluation, with their scores.

Invariant: what is shown is a selection in the order written, and says how much it left out; text
that a model wrote reaches the terminal without control characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.text import Text

from rlhf3d.evaluation.records import GENERATIONS_FILE, Generation, read_generations
from rlhf3d.observability.samples import (
    KINDS,
    SAMPLES_DIR,
    Kind,
    Sample,
    read_samples,
    sample_steps,
    samples_path,
)
from rlhf3d.observability.tables import View


def load(folder: Path, step: int | None, kind: str | None) -> tuple[str, list[Sample]]:
    """Return a title and all samples of a run's `step` (None: the last) and `kind`, or of an
    evaluation.

    `kind` None is train of a run and everything of an evaluation. ValueError where there is none.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kind {kind}: must be one of {', '.join(KINDS)}")
    if (folder / GENERATIONS_FILE).is_file():
        if step is not None:
            raise ValueError(f"--step {step}: {folder} is an evaluation, which has no steps")
        found = [g for g in read_generations(folder, repair=False) if kind in (None, g.mode)]
        return f"{folder} {kind or 'all'}", [_sample(generation) for generation in found]
    chosen: Kind = next((k for k in KINDS if k == kind), "train")
    steps = sample_steps(folder, chosen)
    if not steps:
        other = ", ".join(k for k in KINDS if sample_steps(folder, k)) or "none"
        raise ValueError(
            f"{folder}: no {chosen} samples in {SAMPLES_DIR}/ (kinds there: {other}); "
            "name a run's folder"
        )
    if step is not None and step not in steps:
        raise ValueError(f"--step {step}: {chosen} samples are there for {_ranges(steps)}")
    step = steps[-1] if step is None else step
    return f"{folder} {chosen} step {step}", read_samples(samples_path(folder, step, chosen))


def _sample(generation: Generation) -> Sample:
    """Of an evaluation's completion; its model was never trained further."""
    shared = {item.name for item in fields(Sample)} - {"policy_version"}
    return Sample(**{name: getattr(generation, name) for name in shared}, policy_version=0)


def samples_view(
    title: str, samples: Sequence[Sample], wanted: Callable[[Sample], bool], limit: int
) -> View:
    """Return the first `limit` samples that are `wanted`, in full."""
    kept = [sample for sample in samples if wanted(sample)]
    shown = kept[:limit]
    parts: list[Text] = []
    for sample in shown:
        parts += _parts(sample)
    count = f"{title}: {len(shown)} of {len(kept)} shown, {len(samples)} in all"
    return View([*parts, Text(count, style="bold")], [asdict(sample) for sample in shown])


def _parts(sample: Sample) -> list[Text]:
    color = "red"
    if sample.score >= 1.0:
        color = "green"
    elif sample.outcome == "scored":
        color = "yellow"
    read = "" if sample.answer is None else f", answer {clean(sample.answer)}"
    verdict = f"{sample.outcome}, score {sample.mark}{read}, wanted {clean(sample.ground_truth)}"
    cut_off = ", cut off" if sample.finish_reason == "length" else ""
    return [
        Text(clean(sample.prompt), style="cyan"),
        Text(clean(sample.transcript)),
        Text(f"— {verdict}; {sample.length} tokens{cut_off}", style=color),
        Text(""),
    ]


def clean(text: object) -> str:
    """Text as it stands, line breaks kept, control characters shown as ·."""
    spaced = str(text).replace("\t", " ")
    # Escape sequences that a model wrote could move the cursor or recolor the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in spaced)


def _ranges(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[-10:]))
    return shown if len(steps) <= 10 else f"… {shown}"
