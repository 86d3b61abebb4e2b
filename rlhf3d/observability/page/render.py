"""Views of runs as one HTML file that needs nothing else.

Invariant: text of a run never becomes markup: the template escapes it, what the script shows comes
as JSON without `<` and is set as text, and the page's policy allows its own scripts only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from rlhf3d.observability.metrics import STEP_TIME
from rlhf3d.observability.page.answers import Spread
from rlhf3d.observability.page.bound import recent_phases, step_seconds
from rlhf3d.observability.page.charts import (
    CHARTS,
    POINTS,
    Chart,
    Curve,
    curves,
    held_out_curves,
    phase_stack,
    stride,
)
from rlhf3d.observability.page.collect import RunView
from rlhf3d.observability.page.learning import held_out, reward_name
from rlhf3d.observability.page.trajectories import Shown
from rlhf3d.observability.page.trends import (
    change,
    mean_of,
    recent,
    training_rows,
    values,
    window,
)
from rlhf3d.observability.page.verdict import fine_checks
from rlhf3d.units import format_clock

HELD_OUT = Chart(
    "held_out",
    "Held-out accuracy",
    "Share of held-out prompts answered right, with its 95 % interval: whether what is learned "
    "holds for prompts that are not trained on.",
    (),
    "share",
)
COMPARED = ("reward", "held-out", "length, tokens", "step, s", "tokens/s per device")
"""What runs are compared by: first and last steps, first and last validation, the last steps."""
NOT_FINITE = 1e9
"""JSON has no infinity."""


def render(runs: Sequence[RunView], version: str = "") -> str:
    """Return the page; `version`: of one that `rlhf3d watch` serves, which asks for the next."""
    scripts = [asset("uPlot.iife.min.js"), asset("page.js")]
    if version:
        scripts.append(asset("watch.js"))
    return _template("page.html.j2").render(
        version=version,
        title=" · ".join(run.name for run in runs),
        runs=runs,
        phases=[phase_table(run) for run in runs],
        memory=[memory_table(run) for run in runs],
        facts=[summary(run) for run in runs],
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
    script = asset("watch.js")
    return _template("waiting.html.j2").render(
        version=version,
        status=status,
        style=asset("page.css"),
        script=script,
        policy=policy([script], True),
    )


def watched_policy() -> str:
    """The policy of both pages that are watched, for their HTTP header."""
    return policy([asset("uPlot.iife.min.js"), asset("page.js"), asset("watch.js")], True)


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
    environment.filters |= {"code": _code, "checks": fine_checks}
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
        "charts": list(chart_data(runs)),
        "resumes": _resumes(runs[0]) if len(runs) == 1 else [],
        "phases": [asdict(phase_stack(run.rows)) for run in runs],
        "spreads": [_dicts(run.spreads) for run in runs],
        "groups": [[*map(asdict, run.groups)] for run in runs],
        "trajectories": [[*map(_trajectory, run.trajectories)] for run in runs],
    }


def _resumes(run: RunView) -> list[int]:
    """The steps after which the run went on from a checkpoint."""
    return [step for step, _ in run.facts.starts if step > 0]


def _dicts(spreads: Mapping[str, Spread]) -> dict[str, Any]:
    return {name: asdict(spread) for name, spread in spreads.items()}


def chart_data(runs: Sequence[RunView]) -> Any:
    """Charts that some run has points for; of several runs, each with the first line it has."""
    accuracy = [held_out_curves(run.rows) for run in runs]
    format_ = next((found[1] for found in accuracy if found[0]), "share")
    for chart in CHARTS:
        yield from _chart(chart, chart.format, [curves(chart, run.rows) for run in runs])
        if chart.id == "reward":
            yield from _chart(HELD_OUT, format_, [found for found, _ in accuracy])


def _chart(chart: Chart, format_: str, found: Sequence[Sequence[Curve]]) -> Any:
    lines = []
    for run, lines_of_run in enumerate(found):
        chosen = lines_of_run if len(found) == 1 else lines_of_run[:1]
        lines += [{"run": run, **asdict(line)} for line in chosen]
    if lines:
        facts = {"id": chart.id, "title": chart.title, "help": chart.help, "limit": chart.limit}
        yield {**facts, "format": format_, "lines": lines}


@dataclass(frozen=True)
class PhaseRow:
    """Seconds of a phase in a step."""

    name: str
    measured: float | None
    planned: float | None

    @property
    def most(self) -> float:
        """What the row is sorted by."""
        return self.measured or self.planned or 0.0


def phase_table(run: RunView) -> list[PhaseRow]:
    """Measured and planned seconds of the phases of a step, and of the step."""
    measured, step_s = recent_phases(run.rows), step_seconds(run.rows)
    plan = run.facts.plan
    planned = {} if plan is None else plan.phases
    rows = [
        PhaseRow(name, measured.get(name), planned.get(name))
        for name in dict.fromkeys([*measured, *planned])
    ]
    rows.sort(key=lambda row: -row.most)
    complete = PhaseRow("complete step", step_s, None if plan is None else plan.step_s)
    return [*rows, complete] if complete.most else rows


@dataclass(frozen=True)
class MemoryRow:
    """GiB of processes with the same needs, or of a host."""

    place: str
    phase: str
    planned: float | None
    measured: float | None


def memory_table(run: RunView) -> list[MemoryRow]:
    """Planned memory beside measured: that of the fullest rank, and of the driver's host."""
    plan = run.facts.plan
    names = ("perf/rank_memory_gib", "perf/host_memory_gib")
    rank, host = (max(values(run.rows, name), default=None) for name in names)
    places = () if plan is None else plan.memory
    fullest = max((place.gib for place in places), default=0.0)
    rows = []
    for place in places:
        measured = rank if place.gib == fullest else None
        rows.append(MemoryRow(place.place, place.phase, place.gib, measured))
    if plan is None and rank is not None:
        rows.append(MemoryRow("fullest training rank", "", None, rank))
    if plan is not None or host is not None:
        planned = None if plan is None else plan.host_gib
        rows.append(MemoryRow("host", "", planned, host))
    return rows


def summary(run: RunView) -> dict[str, Any]:
    """A run in a line, and over how many steps its curves are averaged."""
    first, last = run.rows[0]["step"], run.rows[-1]["step"]
    planned = run.facts.total_steps
    of = "" if planned is None else f" of {planned}"
    line = f"Steps {first} to {last}{of} in {format_clock(sum(values(run.rows, STEP_TIME)))}"
    resumes = len(_resumes(run))
    if resumes:
        line += f", resumed {'once' if resumes == 1 else f'{resumes} times'}"
    return {
        "line": f"{line}.",
        "resumed": resumes > 0,
        "window": window(len(training_rows(run.rows))),
    }


def compared(run: RunView) -> list[str]:
    """A run's cells of `COMPARED`."""
    steps = training_rows(run.rows)
    accuracy, last = held_out(run.rows), recent(steps)
    found = change(steps, reward_name(steps))
    cells = ["–" if found is None else f"{found.first.value:.3g} → {found.last}"]
    if accuracy is None:
        cells.append("–")
    else:
        first, end = accuracy.points[0][1], accuracy.points[-1][1]
        cells.append(f"{accuracy.text(first)} → {accuracy.text(end)}")
    for name in ("response_length/mean", STEP_TIME, "perf/throughput"):
        mean = mean_of(last, name)
        cells.append("–" if mean is None else f"{mean:,.1f}")
    return cells


def _trajectory(shown: Shown) -> Mapping[str, Any]:
    """A token as a list: its keys would be most of the page."""
    found = asdict(shown)
    found["tokens"] = [
        [
            token.text,
            token.id,
            token.author,
            token.version,
            token.engine,
            token.trainer,
            _finite(token.difference),
        ]
        for token in shown.tokens
    ]
    return found


def _finite(difference: float | None) -> float | None:
    if difference is None:
        return None
    return NOT_FINITE if math.isinf(difference) else round(difference, 5)
