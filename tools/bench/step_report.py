"""What was measured, as ratios with what was asked of them, and as the table of a document.

Invariant: a ratio is made of figures of one run, value by value as they were measured in turn; one
whose figures are not there is shown as not measured, and never counts as reached or missed.
Pure: numbers and texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

BEGIN = "<!-- written by tools/bench/step.py: do not edit -->"
END = "<!-- end of what tools/bench/step.py wrote -->"


@dataclass(frozen=True)
class Asked:
    """A ratio of two figures, and the least or the most that it may be."""

    title: str
    top: str
    bottom: str
    at_least: float | None = None
    at_most: float | None = None

    def reached(self, value: float) -> bool:
        """Whether a measured ratio is as asked."""
        enough = self.at_least is None or value >= self.at_least
        return enough and (self.at_most is None or value <= self.at_most)

    @property
    def bound(self) -> str:
        """As text."""
        return f"≤ {self.at_most:g}" if self.at_least is None else f"≥ {self.at_least:g}"


def _training(dtype: str) -> tuple[Asked, ...]:
    own, theirs = f"{dtype}/ours", f"{dtype}/transformers"
    return (
        Asked(
            f"update ÷ transformers' forward and backward, {dtype}",
            f"update/{own}",
            f"update/{theirs}",
            at_least=1.0,
        ),
        Asked(
            f"log-probs ÷ transformers' forward, {dtype}",
            f"forward/{own}",
            f"forward/{theirs}",
            at_least=1.0,
        ),
    )


ASKED = (
    *_training("bfloat16"),
    *_training("float32"),
    Asked("generation ÷ raw vLLM", "generation/ours", "generation/vllm", at_least=0.97),
    Asked("update of the engine ÷ packing alone", "sync/update", "sync/packing", at_most=1.5),
    Asked("update on PP2×DP2 ÷ one process", "update_s/pp2dp2", "update_s/one", at_most=0.9),
    Asked("update on TP3×PP2 ÷ one process", "update_s/tp3pp2", "update_s/one", at_most=1.4),
    Asked("TRL's step ÷ ours", "step_s/trl", "step_s/one", at_least=2.5),
    Asked("step ÷ the sum of its phases' limits", "step/step", "limit/step", at_most=1.3),
)
"""What is asked of a step; figures by name."""


@dataclass(frozen=True)
class Figure:
    """One number, measured several times."""

    unit: str
    values: tuple[float, ...]
    limit: float | None = None
    """What the machine allows of it, in the same unit."""

    @property
    def median(self) -> float:
        """Of the values."""
        return median(self.values)


@dataclass
class Results:
    """All that a run of the benchmark found."""

    conditions: dict[str, str]
    figures: dict[str, Figure] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a figure is not there, by its name."""

    def add(
        self, name: str, unit: str, values: Sequence[float], limit: float | None = None
    ) -> None:
        """One figure."""
        self.figures[name] = Figure(unit, tuple(values), limit)

    def ratio(self, asked: Asked) -> list[float]:
        """One for each time; empty where a figure was not measured."""
        if asked.top not in self.figures or asked.bottom not in self.figures:
            return []
        top, bottom = self.figures[asked.top].values, self.figures[asked.bottom].values
        return [one / other for one, other in zip(top, bottom, strict=True)]

    def short(self) -> list[str]:
        """The ratios that fall short."""
        found = []
        for asked in ASKED:
            values = self.ratio(asked)
            if values and not asked.reached(median(values)):
                found.append(f"{asked.title}: {median(values):.2f}, asked {asked.bound}")
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        ratios = {}
        for asked in ASKED:
            values = self.ratio(asked)
            reached = asked.reached(median(values)) if values else None
            ratios[asked.title] = {"values": values, "asked": asked.bound, "reached": reached}
        figures = {}
        for name, figure in self.figures.items():
            figures[name] = {
                "unit": figure.unit,
                "values": list(figure.values),
                "limit": figure.limit,
            }
        return {
            "conditions": self.conditions,
            "ratios": ratios,
            "figures": figures,
            "missing": self.missing,
        }


def markdown(results: Results) -> str:
    """The tables of docs/performance.md."""
    conditions = [f"* {name}: {value}" for name, value in results.conditions.items()]
    parts = [conditions, _ratio_table(results), _figure_table(results)]
    if "step/step" in results.figures:
        parts.append(_phase_table(results.figures))
    return "\n\n".join("\n".join(lines) for lines in parts)


def replace_marked(text: str, tables: str) -> str:
    """A document with `tables` between its two marks. ValueError where it lacks them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN!r} followed by {END!r}: add both lines")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def _ratio_table(results: Results) -> list[str]:
    lines = ["| ratio | median | lowest to highest | asked | reached |", "|---|---|---|---|---|"]
    for asked in ASKED:
        values = results.ratio(asked)
        if values:
            reached = "yes" if asked.reached(median(values)) else "no"
            cells = [f"{median(values):.2f}", _spread(values, ".2f"), asked.bound, reached]
        else:
            cells = [_why(results.missing, asked), "", asked.bound, ""]
        lines.append(f"| {asked.title} | {' | '.join(cells)} |")
    return lines


def _why(missing: Mapping[str, str], asked: Asked) -> str:
    return missing.get(asked.top) or missing.get(asked.bottom) or "not measured"


def _figure_table(results: Results) -> list[str]:
    """All figures but a step's phases, which have a table of their own."""
    lines = [
        "| figure | unit | median | lowest to highest | limit | the limit is × as fast |",
        "|---|---|---|---|---|---|",
    ]
    for name, figure in results.figures.items():
        if name.startswith(("step/", "limit/")):
            continue
        cells = [name, figure.unit, _short(figure.median), _spread(figure.values)]
        cells += ["", ""] if figure.limit is None else _distance(figure, figure.limit)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _distance(figure: Figure, limit: float) -> list[str]:
    # Above 1 there is room in both kinds: rates below their limit, seconds above it.
    room = figure.median / limit if figure.unit == "s" else limit / figure.median
    return [_short(limit), f"{room:.2f}"]


def _phase_table(figures: Mapping[str, Figure]) -> list[str]:
    """Seconds of each phase of a step beside its limit."""
    lines = [
        "| phase of a step | s | lowest to highest | limit, s | s ÷ limit |",
        "|---|---|---|---|---|",
    ]
    for name, figure in figures.items():
        place, _, phase = name.partition("/")
        if place != "step":
            continue
        cells = [phase, _short(figure.median), _spread(figure.values)]
        limit = figures.get(f"limit/{phase}")
        if limit is not None:
            over = f"{figure.median / limit.median:.2f}" if limit.median else "–"
            cells += [_short(limit.median), over]
        else:
            cells += ["not measured", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float], form: str | None = None) -> str:
    low, high = min(values), max(values)
    if form is None:
        return f"{_short(low)} to {_short(high)}"
    return f"{low:{form}} to {high:{form}}"


def _short(value: float) -> str:
    """Three digits, more where they are before the point."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
