"""What became of each key of another framework, for people and programs.

Invariant: decides nothing; the order is that of urgency.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rlhf3d.config.convert.apply import BECAME, Conversion, Finding
from rlhf3d.observability.tables import View, table

TITLES = {
    "to set": "For you to decide",
    "unknown": "Unknown keys, not converted",
    "differs": "Converted, and different in meaning",
    "no counterpart": "Without a counterpart",
    "converted": "Converted",
    "same by default": "The same without a key",
}


def conversion_view(title: str, framework: str, conversion: Conversion) -> View:
    """A table for each fate, and what the user has to set."""
    parts: list[Any] = [f"{title}: {summary(conversion)}"]
    for became in BECAME:
        found = [item for item in conversion.findings if item.became == became]
        if found:
            rows = [_row(item, framework) for item in found]
            parts += ["", table(rows, title=f"{TITLES[became]} ({len(found)})")]
    parts += [f"note: {note}" for note in conversion.notes]
    parts += [f"to set: {text}" for text in conversion.to_set]
    data = {
        "config": conversion.values,
        "keys": [asdict(item) for item in conversion.findings],
        "notes": list(conversion.notes),
        "to_set": conversion.to_set,
    }
    return View(parts, data)


def summary(conversion: Conversion) -> str:
    """How many of the given keys had which fate."""
    counts = Counter(item.became for item in conversion.findings if item.name)
    told = [f"{counts[became]} {became}" for became in BECAME if counts[became]]
    return f"{counts.total()} keys: {', '.join(told)}"


def _row(finding: Finding, framework: str) -> dict[str, object]:
    # Without a name it follows from other keys, or from the framework's default.
    return {
        framework: finding.name or "(not given)",
        "value": _text(finding.value),
        "here": f"{finding.to} = {_text(finding.ours)}" if finding.to else "",
        "note": finding.note,
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value)
