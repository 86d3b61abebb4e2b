"""Limits are said once: docs/metrics.md has them as the checks do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf3d.observability.page.charts import CHARTS
from rlhf3d.observability.page.limits import HEALTHY

DOCUMENT = (Path(__file__).parents[4] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = [line for line in DOCUMENT.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("metric", HEALTHY)
def test_what_is_healthy_is_documented_as_it_is_judged(metric: str) -> None:
    (row,) = [row for row in ROWS if row.startswith(f"| `{metric}`")]
    healthy = row.strip("| ").rpartition(" | ")[2]
    assert healthy.startswith(HEALTHY[metric]), healthy


def test_charts_with_a_limit_say_it() -> None:
    limited = [chart for chart in CHARTS if chart.limit is not None]
    assert len(limited) >= 5
    for chart in limited:
        assert any(HEALTHY[line.metric] in chart.help for line in chart.lines[:1]), chart.id


def test_no_table_says_otherwise() -> None:
    """Numbers of other pages that judge are those of the checks."""
    page = (Path(__file__).parents[4] / "docs" / "not_learning.md").read_text(encoding="utf-8")
    (below,) = re.findall(r"`training/rollout_probs_diff_mean` below ([0-9.]+) is healthy", page)
    assert HEALTHY["training/rollout_probs_diff_mean"].endswith(below)
