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
    assert healthy.startswith(HEALTHY[metric].words), healthy


def test_charts_with_a_limit_say_it() -> None:
    limited = [chart for chart in CHARTS if chart.limit is not None]
    assert len(limited) >= 6
    for chart in limited:
        healthy = HEALTHY[chart.lines[0].metric]
        assert chart.limit == healthy.line and chart.healthy == f"Healthy: {healthy.words}."


def test_no_table_says_otherwise() -> None:
    """Numbers of other pages that judge are those of the checks."""
    page = (Path(__file__).parents[4] / "docs" / "not_learning.md").read_text(encoding="utf-8")
    (below,) = re.findall(r"`training/rollout_probs_diff_mean` below ([0-9.]+) is healthy", page)
    assert HEALTHY["training/rollout_probs_diff_mean"].line == float(below)
