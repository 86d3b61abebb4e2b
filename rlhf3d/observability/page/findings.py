"""What a page says in words.

Invariant: a finding has its figures in its text, so that it can be checked against the curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["bad", "watch", "unknown", "good", "fact"]
"""unknown: the run does not say (yet); fact: neither good nor bad."""
ORDER: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """One answer."""

    level: Level
    title: str
    """In a few words."""
    text: str
    """With the figures."""
    advice: str = ""
    """What to do; empty where nothing has to be done."""
    chart: str = ""
    """The chart that shows it."""


def share(value: float) -> str:
    """A share for people."""
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.2g} %"
