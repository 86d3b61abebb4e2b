"""`rlhf3d doctor mismatch CONFIG`: start engine and trainer once, and say which setting parts them.

Invariant: a mistake in the configuration is reported as `rlhf3d train` reports it, before anything
is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.text import Text

from rlhf3d.config.checks import check
from rlhf3d.config.load import ConfigError
from rlhf3d.config.resolve import load_run
from rlhf3d.evaluation.mismatch import Examined, examine_pairs, mismatch_view, settings_in, short
from rlhf3d.observability.mismatch.summary import figures
from rlhf3d.observability.mismatch.trial import TITLES, Finding, Variation, conclude
from rlhf3d.observability.tables import Row, View, table
from rlhf3d.planning.plan import Plan
from rlhf3d.preflight import preflight
from rlhf3d.trainer.mismatch_trial import compare
from rlhf3d.trainer.preemption import PreemptionHandler

FOLDER = "mismatch"
"""Beside the run's folder, whose name it goes on from."""


@dataclass(frozen=True)
class Tried:
    """What is known of a configuration's two sides."""

    folder: Path
    examined: Examined
    """As configured."""
    variations: Sequence[Variation]
    finding: Finding


def try_config(
    path: Path,
    overrides: Sequence[str],
    answers: int,
    float32: bool,
    preemption: PreemptionHandler,
    show: Callable[[Plan], None] | None = None,
) -> Tried:
    """Compare both sides as configured, and with one thing varied at a time.

    `float32`: also there, where the configuration is not in it and this machine can. `show` is
    given the plan where memory is short. ConfigError where the configuration cannot run here.
    """
    config = load_run(path, overrides)
    if problems := preflight(config, show=show):
        raise ConfigError(problems, f"This machine cannot run {path} as it stands")
    output = Path(config.trainer.output_dir)
    folder = output.with_name(f"{output.name}_{FOLDER}")
    settings, notes = settings_in(config.model, config.rollout)
    variations = compare(config, settings, folder, answers, preemption)
    if float32 and settings.precision != "float32":
        model = replace(config.model, dtype="float32")
        rollout = replace(config.rollout, dtype="float32", quantization="none")
        varied = replace(config, model=model, rollout=rollout)
        if problems := [*check(varied), *preflight(varied)]:
            notes.append(f"float32 was not tried: {'; '.join(problems)}")
        else:
            exact = replace(settings, precision="float32")
            own = folder / "float32"
            (found,) = compare(varied, exact, own, answers, preemption, only=True)
            variations.append(replace(found, kind="float32"))
    examined = examine_pairs(folder, variations[0].pairs, settings, notes)
    return Tried(folder, examined, variations, conclude(examined.diagnosis, variations))


def tried_view(tried: Tried) -> View:
    """The setting first, then the variations, then what `doctor mismatch RUN` shows."""
    finding, own = tried.finding, mismatch_view(tried.folder, tried.examined)
    head = Text(f"{finding.setting}: " if finding.setting else "", style="bold red")
    rows = [_row(variation) for variation in tried.variations]
    title = "One thing varied at a time: log-prob of the first side − the second's, nats"
    where = f"tokens and logs: {tried.folder} (`rlhf3d samples {tried.folder} --tokens --worst`)"
    head.append(finding.text, style="default")
    data = {"finding": asdict(finding), "variations": [_data(one) for one in tried.variations]}
    return View([head, table(rows, title=title), where, "", *own.parts], data | own.data)


def _row(variation: Variation) -> Row:
    found = figures(variation.pairs)
    return {
        "variation": TITLES[variation.kind],
        "tokens": found.tokens,
        "mean |diff|": short(found.abs_mean),
        "p99": short(found.abs_p99),
        "max": short(found.abs_max),
        "rounding is up to": short(variation.settings.limit),
        "agrees": "yes" if variation.agrees else "no",
        "note": variation.note,
    }


def _data(variation: Variation) -> dict[str, object]:
    found = asdict(figures(variation.pairs))
    own = {"kind": variation.kind, "agrees": variation.agrees, "note": variation.note}
    return own | {"figures": found, "limit": variation.settings.limit}
