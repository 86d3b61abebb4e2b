"""The page in headless Chromium: it draws, says nothing on the console, and is there in time.

Skipped where no Chromium is installed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from support.browser import needs_chromium, page_after
from support.page_runs import healthy_rows, sample, trajectory, with_validation, write_rows
from support.timelines import timeline

from rlhf3d.observability.page.collect import RunFacts, collect, read_rows
from rlhf3d.observability.page.render import render
from rlhf3d.observability.profile.timeline import write_timeline
from rlhf3d.observability.samples import write_samples
from rlhf3d.observability.tokens import write_tokens

pytestmark = needs_chromium


def test_a_page_draws_without_a_word_on_the_console(tmp_path: Path) -> None:
    """Every chart has its canvas, and hostile text stays text."""
    run = tmp_path / "run"
    rows = healthy_rows(40)
    rows[-1] = with_validation(rows[-1], 0.5)
    write_rows(run, rows)
    text = "</script><img src=x onerror=document.title='broken'>"
    write_samples(run, 40, [sample("p", text, 1.0), sample("p", "b", 0.0)])
    write_tokens(run, 40, [trajectory(0, 0.9, ["a", text, "c"])])
    profiled = timeline()
    driver = replace(profiled.lanes[0], process=replace(profiled.lanes[0].process, name=text))
    write_timeline(run, replace(profiled, lanes=(driver, *profiled.lanes[1:])))
    page = tmp_path / "page.html"
    page.write_text(render([collect(run, run.name, read_rows(run), RunFacts())]), encoding="utf-8")
    shown = page_after(page.as_uri(), tmp_path / "profile", 2000)
    assert 'data-ready="yes"' in shown
    charts = re.findall(r'<figure class="chart', shown)
    assert len(charts) > 15 and shown.count("<canvas") == len(charts)
    assert shown.count("score 1 · read as &lt;/script&gt;&lt;img") == 1
    assert "<img" not in shown and shown.count("&lt;/script&gt;&lt;img") >= 2
