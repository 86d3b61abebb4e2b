"""Views of runs as one HTML file that needs nothing else.

Invariant: text of a run never becomes markup: the template escapes it, what the script shows comes
as JSON without `<` and is set as text, and the page's policy allows its own scripts only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from typing import Any

from rlhf3d.observability.page.answers import Spread
from rlhf3d.observability.page.charts import (
    CHARTS,
    POINTS,
    Chart,
    Curve,
    Format,
    curves,
    held_out_curves,
    phase_stack,
    stride,
)
from rlhf3d.observability.page.collect import RunView
from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.page.tables import (
    COMPARED,
    compared,
    excerpts,
    memory_table,
    phase_table,
    summary,
)
from rlhf3d.observability.page.trajectories import Shown
from rlhf3d.observability.page.trends import training_rows, window
from rlhf3d.observability.page.verdict import fine_checks

HELD_OUT = Chart(
    "held_out",
    "Held-out accuracy",
    "Share of held-out prompts answered right: whether what is learned holds for prompts that are "
    "not trained on.",
    (),
    "share",
)
SCRIPTS, WATCH = ("uPlot.iife.min.js", "timeline.js", "page.js"), "watch.js"
NOT_FINITE = 1e9
"""JSON has no infinity."""


def render(runs: Sequence[RunView], version: str = "") -> str:
    """Return the page; `version`: of one that `rlhf3d watch` serves, which asks for the next."""
    scripts = [asset(name) for name in (*SCRIPTS, *([WATCH] if version else []))]
    return _template("page.html.j2").render(
        version=version,
        title=" · ".join(run.name for run in runs),
        runs=runs,
        phases=[phase_table(run) for run in runs],
        memory=[memory_table(run) for run in runs],
        facts=[summary(run) for run in runs],
        excerpts=[excerpts(run) for run in runs],
        comparison=[compared(run) for run in runs],
        compared=COMPARED,
        points=POINTS,
        strides=[stride(len(training_rows(run.rows))) for run in runs],
        styles=[asset("uPlot.min.css"), asset("page.css")],
        scripts=scripts,
        policy=policy(scripts, bool(version)),
        data=embedded(page_data(runs)),
    )


def render_waiting(version: str, status: Sequence[str]) -> str:
    """The page that `rlhf3d watch` serves before there is anything to draw."""
    script = asset(WATCH)
    return _template("waiting.html.j2").render(
        version=version,
        status=status,
        style=asset("page.css"),
        script=script,
        policy=policy([script], True),
    )


def watched_policy() -> str:
    """The policy of both pages that are watched, for their HTTP header."""
    return policy([asset(name) for name in (*SCRIPTS, WATCH)], True)


def policy(scripts: Sequence[str], watched: bool) -> str:
    """Content-Security-Policy that allows these scripts, and nothing from elsewhere."""
    parts = [
        "default-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "script-src " + " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    ]
    return "; ".join([*parts, "connect-src 'self'"] if watched else parts)


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rlhf3d.observability.page", "assets"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "checks": fine_checks, "breakable": _breakable}
    return environment.get_template(name)


def asset(name: str) -> str:
    """A file that belongs to the page."""
    folder = resources.files("rlhf3d.observability.page") / "assets"
    return (folder / name).read_text(encoding="utf-8")


def _code(text: str) -> Any:
    """Escaped, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    escaped = [
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    ]
    return Markup("").join(escaped)


def _breakable(key: str) -> Any:
    """Escaped, with places at which a key may be broken into lines."""
    from markupsafe import Markup, escape

    # Not at the point of a number.
    parts = re.split(r"(?<=[_/])|(?<=\.)(?=[a-z])", key)
    return Markup("<wbr>").join(escape(part) for part in parts)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def embedded(data: Any) -> str:
    """JSON that can stand in a page: without `<`, nothing in it ends or begins an element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def page_data(runs: Sequence[RunView]) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "runs": [run.name for run in runs],
        "windows": [window(len(training_rows(run.rows))) for run in runs],
        "steps": [len(training_rows(run.rows)) for run in runs],
        "charts": list(chart_data(runs)),
        "resumes": runs[0].facts.resumes if len(runs) == 1 else [],
        "phases": [asdict(phase_stack(run.rows)) for run in runs],
        "spreads": [_dicts(run.spreads) for run in runs],
        "groups": [[*map(asdict, run.groups)] for run in runs],
        "trajectories": [[*map(_trajectory, run.trajectories)] for run in runs],
        "profiles": [[*map(asdict, run.profiles)] for run in runs],
    }


def _dicts(spreads: Mapping[str, Spread]) -> dict[str, Any]:
    return {name: asdict(spread) for name, spread in spreads.items()}


def chart_data(runs: Sequence[RunView]) -> Any:
    """Charts that some run has points for; of several runs, each with the first line it has."""
    accuracy = [held_out_curves(run.rows) for run in runs]
    format_: Format = next((found[1] for found in accuracy if found[0]), "share")
    setups = [run.facts.setup for run in runs if run.facts.setup is not None]
    for chart in CHARTS:
        yield from _chart(_fitted(chart, setups), [curves(chart, run.rows) for run in runs])
        if chart.id == "reward":
            drawn = [found for found, _ in accuracy]
            yield from _chart(replace(HELD_OUT, format=format_), drawn)


def _fitted(chart: Chart, setups: Sequence[Setup]) -> Chart:
    """With the words and the limit that hold for these runs."""
    if chart.bypass and any(setup.old_from_engine for setup in setups):
        chart = replace(chart, help=f"{chart.help} {chart.bypass}")
    if chart.asynchronous and any(setup.max_staleness for setup in setups):
        chart = replace(chart, help=f"{chart.help} {chart.asynchronous}")
    if chart.about_groups and setups and not any(setup.needs_groups for setup in setups):
        words = "This run's estimator compares no groups."
        chart = replace(chart, limit=None, healthy="", help=f"{chart.help} {words}")
    if chart.one_update and setups and all(setup.one_update for setup in setups):
        chart = replace(chart, limit=None, healthy="", help=f"{chart.help} {chart.one_update}")
    return chart


def _chart(chart: Chart, found: Sequence[Sequence[Curve]]) -> Any:
    lines = []
    for run, lines_of_run in enumerate(found):
        chosen = lines_of_run if len(found) == 1 else lines_of_run[:1]
        lines += [{"run": run, **asdict(line)} for line in chosen]
    if lines:
        names = ("id", "title", "limit", "unit", "format")
        help_ = f"{chart.help} {chart.healthy}".strip()
        yield {**{name: getattr(chart, name) for name in names}, "help": help_, "lines": lines}


def _trajectory(shown: Shown) -> Mapping[str, Any]:
    tokens = [token._replace(difference=_finite(token.difference)) for token in shown.tokens]
    return vars(shown) | {"tokens": tokens}


def _finite(difference: float | None) -> float | None:
    if difference is None:
        return None
    return NOT_FINITE if math.isinf(difference) else round(difference, 5)
