"""The four answers of a page: is it learning, is it healthy, what limits it, what did it write.

Invariant: a function of the metrics and of the run's setup, where that is known, the same for the
page and the Markdown report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf3d.observability.page.bound import bound, wrote
from rlhf3d.observability.page.findings import Finding, Level
from rlhf3d.observability.page.health import Known, health
from rlhf3d.observability.page.learning import learning
from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.page.trends import Rows


@dataclass(frozen=True)
class Verdict:
    """What the metrics of a run say."""

    learning: Finding
    healthy: Finding
    bound: Finding
    wrote: Finding
    checks: tuple[Finding, ...]
    """What `healthy` sums up, the worst first."""

    @property
    def answers(self) -> tuple[tuple[str, Finding], ...]:
        """With their questions, in order."""
        return (
            ("Is it learning?", self.learning),
            ("Is it healthy?", self.healthy),
            ("What limits it?", self.bound),
            ("What did it write?", self.wrote),
        )


def judge(rows: Rows, setup: Setup | None = None) -> Verdict:
    """Judge the rows of `metrics.jsonl`."""
    learns = learning(rows, setup)
    checks = health(rows, Known(learns.level == "good", setup))
    return Verdict(learns, summed_up(checks), bound(rows, setup), wrote(rows), checks)


def summed_up(checks: Sequence[Finding]) -> Finding:
    """All checks as one finding."""
    bad, watch, unknown = (_titles(checks, level) for level in ("bad", "watch", "unknown"))
    if not checks:
        return Finding("unknown", "Nothing to check yet", "The run has no training step yet.")
    fine = f"{fine_checks(len(_titles(checks, 'good')))}."
    if unknown:
        fine += f" Not settled: {_listed(unknown)}."
    if bad:
        return Finding("bad", "Something is wrong", f"{_listed(bad + watch)}. {fine}", "", "checks")
    if watch:
        return Finding("watch", "Something to watch", f"{_listed(watch)}. {fine}", "", "checks")
    return Finding("good", "It is healthy", fine, "", "checks")


def _titles(checks: Sequence[Finding], level: Level) -> list[str]:
    return [check.title for check in checks if check.level == level]


def fine_checks(count: int) -> str:
    """In words."""
    return "1 check is fine" if count == 1 else f"{count} checks are fine"


def _listed(titles: Sequence[str]) -> str:
    return "; ".join(titles)
