"""`rlhf3d doctor mismatch`: where engine and trainer of a run part, and why.

Invariant: only what the run wrote is read; what it does not say is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf3d.checkpoints.store import CONFIG_FILE
from rlhf3d.config.load import load_config
from rlhf3d.config.schema import ModelConfig, RolloutConfig
from rlhf3d.evaluation.browse import clean
from rlhf3d.models.spec import load_spec
from rlhf3d.observability.mismatch.causes import Cause, Settings
from rlhf3d.observability.mismatch.diagnosis import Diagnosis, diagnose, judged_pairs
from rlhf3d.observability.mismatch.pairs import Pairs, read_pairs
from rlhf3d.observability.mismatch.rounding import coarsest
from rlhf3d.observability.mismatch.summary import Figures, Line, Summary, summarize
from rlhf3d.observability.tables import Row, View, table

_COLORS = {"healthy": "green", "cause": "bold red", "unknown": "yellow"}


@dataclass(frozen=True)
class Examined:
    """What is known of a run's two sides."""

    diagnosis: Diagnosis
    summary: Summary
    settings: Settings
    notes: tuple[str, ...]
    """What could not be found out."""


def examine(run: Path) -> Examined:
    """Judge the tokens that a run kept. ValueError where there are none to compare."""
    pairs = read_pairs(run)
    settings, notes = settings_of(run / CONFIG_FILE)
    return examine_pairs(run, pairs, settings, notes)


def examine_pairs(run: Path, pairs: Pairs, settings: Settings, notes: Sequence[str]) -> Examined:
    """Judge the tokens of a run, or of what was started like one."""
    if not len(pairs):
        raise ValueError(f"{run}: no token has two finite log-probs; logs/driver.log names them")
    return Examined(
        diagnose(pairs, settings), summarize(judged_pairs(pairs), pairs), settings, tuple(notes)
    )


def settings_of(path: Path) -> tuple[Settings, list[str]]:
    """What matters of a run's configuration, and what is not known of it."""
    if not path.is_file():
        return Settings(), [f"no {path.name}: taken for a run in bfloat16"]
    try:
        config = load_config(path)
    except ValueError as error:
        return Settings(), [f"{path.name} cannot be used: {error}; taken for a run in bfloat16"]
    return settings_in(config.model, config.rollout)


def settings_in(model: ModelConfig, rollout: RolloutConfig) -> tuple[Settings, list[str]]:
    """What matters of a configuration, and what is not known of its model."""
    notes, experts = [], False
    try:
        spec = load_spec(Path(model.path), with_weights=False)
        experts = bool(spec.num_experts)
    except (ValueError, OSError) as error:
        notes.append(f"the model is not here, so taken for one without experts: {error}")
    precision = coarsest(model.dtype, rollout.dtype, rollout.quantization)
    settings = Settings(precision, rollout.temperature, rollout.top_p, rollout.top_k, experts)
    return settings, notes


def mismatch_view(run: Path, found: Examined) -> View:
    """The verdict first, then causes, figures and the worst tokens."""
    diagnosis, summary = found.diagnosis, found.summary
    verdict = Text(f"{run}: {diagnosis.verdict}. ", style=_COLORS[diagnosis.verdict])
    parts: list[str | Text | Table] = [verdict.append(diagnosis.text, style="default")]
    parts += [f"note: {note}" for note in found.notes]
    for place, cause in enumerate(diagnosis.causes, 1):
        parts += ["", *_lines(place, cause)]
    rows: list[Row] = [_row("all", "", summary.all)]
    for name, lines in summary.tables.items():
        if len(lines) > 1:
            rows.append({})
            rows += _rows(name, lines)
    title = "Engine's log-prob − trainer's, nats"
    parts += ["", table(rows, title=title)]
    if diagnosis.verdict != "healthy" and summary.worst:
        parts.append(table(_worst(summary), title="The worst tokens", digits=4))
    return View(parts, _data(found))


def _lines(place: int, cause: Cause) -> list[str | Text]:
    heading = Text(f"{place}. {cause.title}", style="bold").append(
        f" ({cause.kind}, score {cause.score:.2f})", style="default"
    )
    return [heading, f"   {cause.evidence}", f"   {cause.advice}"]


def _rows(name: str, lines: list[Line]) -> list[Row]:
    names = [name, *[""] * (len(lines) - 1)]
    return [_row(own, line.label, line.figures) for own, line in zip(names, lines, strict=True)]


def _row(name: str, label: str, figures: Figures) -> Row:
    return {
        "by": name,
        "range": Text(label),
        "tokens": figures.tokens,
        "mean |diff|": short(figures.abs_mean),
        "mean diff": short(figures.mean),
        "p50": short(figures.abs_p50),
        "p99": short(figures.abs_p99),
        "max": short(figures.abs_max),
        "KL (k3)": short(figures.kl_k3),
        "mean |prob diff|": short(figures.prob_abs_mean),
    }


def short(value: float) -> Text:
    """With the digits that count: rounding of float32 has its first in the seventh place."""
    return Text(f"{value:.2g}", justify="right")


def _worst(summary: Summary) -> list[Row]:
    rows: list[Row] = []
    for token in summary.worst:
        rows.append(
            {
                "step": token.step,
                "trajectory": token.trajectory,
                "position": token.position,
                "text before": Text(repr(clean(token.before))),
                "token": Text(repr(clean(token.text))),
                "engine": token.engine,
                "trainer": token.trainer,
            }
        )
    return rows


def _data(found: Examined) -> Mapping[str, Any]:
    data = asdict(found.diagnosis)
    rest = {"summary": asdict(found.summary), "settings": asdict(found.settings)}
    return data | rest | {"notes": list(found.notes)}
