"""The live view as text: a state of the run at a time, for a width and a height.

Invariant: no line is wider than the terminal and there are fewer lines than it has, so that what is
drawn can be taken back; a figure that the run lacks takes no place.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from rlhf3d.observability.live.state import MemoryPlanned, RunState, Waited
from rlhf3d.observability.metrics import KL_TO_REFERENCE, STEP_TIME
from rlhf3d.observability.samples import printable
from rlhf3d.units import format_clock

STALENESS = "training/off_policy/trajectory_staleness_worst"

FIGURES = (
    # z: what rounds to zero has no minus sign.
    ("reward", ("critic/score/mean",), "z.3f"),
    ("generated", ("filter_groups/generated_score/mean",), "z.3f"),
    ("KL to ref", KL_TO_REFERENCE, "z.4f"),
    ("mismatch", ("training/rollout_probs_diff_mean",), "z.4f"),
    ("entropy", ("actor/entropy",), "z.3f"),
    ("length", ("response_length/mean",), ".0f"),
    ("truncated", ("response/truncated_ratio",), ".1%"),
)
"""(label, metrics of which the first known counts, format) of the figures with a trend."""

_LEVELS = "▁▂▃▄▅▆▇█"
_LABEL, _VALUE = 10, 8
_GAP = "  "
_LEAST_COLUMN = 30
_MOST_WIDTH = 140
"""On a wider terminal the rest stays empty: trends would be far from their labels."""


def picture(
    state: RunState, now: float, width: int, height: int, waited: Waited | None = None
) -> Text:
    """Return the view; `waited`: whom the driver waits for, if anybody."""
    width = min(width, _MOST_WIDTH)
    lines = [_status(state, now)]
    if state.is_slow(now, waited):
        lines += _slow(state, now, waited, width)
    lines += _figures(state.rows, width)
    lines += _held_out(state, width)
    lines += _list("time", [f"{phase} {share:.0%}" for phase, share in _shown(state)], width)
    if state.rows:
        lines += _list("queue", _queue(state.rows[-1]), width)
        lines += _list("memory", _memory(state.rows[-1], state.planned), width)
    # One line for the cursor of what is printed above.
    lines = [_bar(state, width), *lines][: max(1, height - 1)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True, overflow="crop", end="").join(lines)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return a trend of at most `width` characters, from the least to the greatest value.

    Of more values each character is a mean; what is missing or not finite leaves a space.
    """
    count = len(values)
    parts = min(width, count)
    means = []
    for part in range(parts):
        some = values[part * count // parts : (part + 1) * count // parts]
        known = [value for value in some if value is not None and math.isfinite(value)]
        means.append(fmean(known) if known else None)
    finite = [mean for mean in means if mean is not None]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(" " if mean is None else _level(mean - low, span) for mean in means)


def _level(above: float, span: float) -> str:
    return _LEVELS[round(above / span * (len(_LEVELS) - 1)) if span else 0]


def _bar(state: RunState, width: int) -> Text:
    """The steps done, as a line between the view and what is above it."""
    done = int(width * state.step / state.total) if state.total else 0
    return Text.assemble(("━" * done, "cyan"), ("─" * (width - done), "dim"))


def _status(state: RunState, now: float) -> Text:
    parts = []
    if state.total is not None:
        # The one that runs; after the last there is none.
        step = min(state.step + 1, state.total)
        parts.append(Text(f"step {step}/{state.total}", "bold"))
    if state.left_s is not None:
        left_s = max(0.0, state.left_s - (now - state.step_ended))
        parts.append(Text(f"ETA {format_clock(left_s)}"))
    if state.phase:
        ran = format_clock(now - state.phase_began)
        parts.append(Text(f"{state.phase} {ran}", "bold cyan"))
    elif not state.rows:
        parts.append(Text("starting", "cyan"))
    usual_s = state.usual_s()
    if usual_s is not None and usual_s >= 1:
        parts[-1].append(f" (before {format_clock(usual_s)})", "not bold dim")
    return Text(" │ ").join(parts)


def _slow(state: RunState, now: float, waited: Waited | None, width: int) -> Iterator[Text]:
    """Say that the phase is slow, and name who is waited for as far as the width allows."""
    said, usual_s = f"{state.phase} takes long", state.usual_s()
    ran_s = now - state.phase_began
    if usual_s and ran_s > usual_s:
        said = f"{state.phase} takes {ran_s / usual_s:.1f} times its longest"
    if waited is not None:
        left_s = max(0.0, waited.timeout_s - (now - waited.since))
        said += f"; deadline in {format_clock(left_s)}"
    yield Text(said, "yellow")
    if waited is not None and (names := waited.names):
        yield Text(_waits_for(names, width), "yellow")


def _waits_for(names: Sequence[str], width: int) -> str:
    """As many names as fit, and how many others there are."""
    text = ""
    for count in range(len(names), 0, -1):
        others = len(names) - count
        more = f" and {others} more" if others else ""
        text = f"waits for {', '.join(names[:count])}{more}"
        if cell_len(text) <= width:
            break
    return text


@dataclass(frozen=True)
class _Cell:
    label: str
    value: str
    trend: Sequence[float | None]


def _figures(rows: Sequence[Mapping[str, Any]], width: int) -> Iterator[Text]:
    """Figures with their trends, in columns."""
    cells = [*_cells(rows)]
    columns = max(1, min(3, width // _LEAST_COLUMN))
    each = (width - (columns - 1) * len(_GAP)) // columns
    trend_width = max(0, each - _LABEL - _VALUE - 1)
    for first in range(0, len(cells), columns):
        line = Text()
        for cell in cells[first : first + columns]:
            trend = sparkline(cell.trend, trend_width)
            line.append(f"{cell.label:<{_LABEL}}", "dim").append(f"{cell.value:>{_VALUE}} ", "bold")
            line.append(f"{trend:<{trend_width}}", "cyan").append(_GAP)
        line.rstrip()
        yield line


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[_Cell]:
    for label, names, spec in FIGURES:
        trend = _trend(rows, names)
        known = [value for value in trend if value is not None]
        if known:
            yield _Cell(label, format(known[-1], spec), trend)
    speeds = [_tokens_per_s(row) for row in rows]
    if rows and speeds[-1] is not None:
        yield _Cell("tokens/s", f"{speeds[-1]:.0f}", speeds)


def _trend(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[float | None]:
    """Of the first of these metrics that any row has."""
    trend: list[float | None] = []
    for name in names:
        trend = [row.get(name) for row in rows]
        if trend != [None] * len(rows):
            break
    return trend


def _tokens_per_s(row: Mapping[str, Any]) -> float | None:
    """Of a complete step, on all devices together."""
    if "perf/total_num_tokens" not in row or not row.get(STEP_TIME):
        return None
    speed: float = row["perf/total_num_tokens"] / row[STEP_TIME]
    return speed


def _held_out(state: RunState, width: int) -> list[Text]:
    """Accuracies, each with its trend."""
    parts = []
    for (source, measure), values in state.held_out.items():
        trend = sparkline(values, 12)
        parts.append(f"{printable(source)} {measure} {values[-1]:.1%} {trend}")
    return _list("held-out", parts, width)


def _shown(state: RunState) -> list[tuple[str, float]]:
    """Phases with a share that does not round to nothing."""
    return [(phase, share) for phase, share in state.shares().items() if share >= 0.005]


def _queue(row: Mapping[str, Any]) -> list[str]:
    """What an asynchronous run had ahead when the last batch was taken."""
    parts = []
    if "async/groups_complete" in row:
        complete, running = row["async/groups_complete"], row["async/groups_running"]
        parts.append(f"{complete:.0f} groups complete, {running:.0f} running")
    if f"{STALENESS}/mean" in row:
        worst = row[f"{STALENESS}/max"]
        parts.append(f"staleness {row[f'{STALENESS}/mean']:.1f} (max {worst:.0f})")
    if "async/overlap_share" in row:
        parts.append(f"hidden by training {row['async/overlap_share']:.0%}")
    return parts


def _memory(row: Mapping[str, Any], planned: MemoryPlanned | None) -> list[str]:
    """What was measured, each beside the plan's where there is one."""
    parts = []
    if "perf/rank_memory_gib" in row:
        plan = "" if planned is None else f" (plan {planned.rank:.1f})"
        parts.append(f"fullest rank {row['perf/rank_memory_gib']:.1f} GiB{plan}")
    if "perf/host_memory_gib" in row:
        plan = "" if planned is None else f" (the run's plan {planned.host:.1f})"
        parts.append(f"host in use {row['perf/host_memory_gib']:.1f} GiB{plan}")
    return parts


def _list(label: str, parts: Sequence[str], width: int) -> list[Text]:
    """The parts in as few lines as they fit into, of which the first ones are shown."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]} · {part}" if lines else part
        if lines and _LABEL + cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    labels = [label, "", ""][: len(lines)]
    return [
        Text.assemble((f"{name:<{_LABEL}}", "dim"), line)
        for name, line in zip(labels, lines, strict=False)
    ]
