"""Console output: plain text is exact and free of control characters.

The live bar shows phase and ETA.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf3d.observability.console import STEP_FIELDS, STEP_PHASES, Console, step_line
from rlhf3d.observability.samples import Sample

METRICS = {
    "critic/score/mean": 0.34,
    "response_length/mean": 31.4,
    "actor/ppo_kl": 0.0021,
    "training/rollout_probs_diff_mean": 0.01,
    "timing_s/generate": 5.1,
    "timing_s/update_actor": 10.2,
    "timing_s/update_critic": 8.0,
    "timing_s/sync_weights": 0.4,
    "timing_s/step": 26.0,
}
SAMPLE = Sample("2+3?", "4", "5", 0.0, "scored", 1, "stop", 0)


def plain_console(clock: list[float]) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(out, clock=lambda: clock[0]), out


def test_plain_output_is_exact() -> None:
    clock = [0.0]
    console, out = plain_console(clock)
    with console:
        console.header(["model [bold]x[/bold]", "layout TP3×PP2×DP1"], total_steps=40)
        with console.phase("validate"):
            clock[0] = 65.0
        console.validation(
            "before",
            {"val-core/arithmetic/acc/greedy": 0.21, "val-core/arithmetic/acc/mean@4": 0.0925},
        )
        with console.phase("generate"):
            pass
        console.step(METRICS, 1, 40)
        with console.phase("generate"):
            pass
        console.step({**METRICS, "timing_s/step": 28.0}, 12, 40)
        console.done(["saved"])
    assert out.getvalue().splitlines() == [
        "model [bold]x[/bold]",
        "layout TP3×PP2×DP1",
        "[0:00] validate …",
        "validate before │ arithmetic greedy 21.0% │ arithmetic mean@4 9.2%",
        "[1:05] generate …",
        "step  1/40 │ reward 0.340 │ len 31 │ kl 0.0021 │ mismatch 0.0100 │ "
        "gen 5.1s upd 18.2s sync 0.4s │ 26 s, eta 16:54",
        "step 12/40 │ reward 0.340 │ len 31 │ kl 0.0021 │ mismatch 0.0100 │ "
        "gen 5.1s upd 18.2s sync 0.4s │ 28 s, eta 12:36",
        "saved",
    ]


def test_step_line_shows_what_there_is() -> None:
    assert step_line({"critic/score/mean": -0.0001, "timing_s/update_actor": 3.0}, 2, 9) == (
        "step 2/9 │ reward 0.000 │ upd 3.0s"
    )
    assert step_line({"critic/score/mean": float("nan")}, 2, 9) == "step 2/9 │ reward nan"


def test_plain_sample_table_has_no_control_characters() -> None:
    console, out = plain_console([0.0])
    console.samples([SAMPLE], [replace(SAMPLE, response="\x1b[31mso [red]5[/red]\r\n", score=1.0)])
    text = out.getvalue()
    assert "[0] 4" in text
    assert "[31mso [red]5[/red]" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(map(len, text.splitlines())) <= 110


def test_samples_must_pair() -> None:
    console, _ = plain_console([0.0])
    with pytest.raises(ValueError, match="shorter"):
        console.samples([SAMPLE, SAMPLE], [SAMPLE])


def test_live_bar_shows_phase_and_eta_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    clock = [0.0]
    out = io.StringIO()
    with Console(out, interactive=True, clock=lambda: clock[0]) as console:
        console.header([], total_steps=10)
        console.step({"timing_s/step": 30.0}, 1, 10)
        with console.phase("generate"):
            clock[0] = 7.0
            assert console._progress is not None
            console._progress.refresh()
    text = out.getvalue()
    assert "1/10 steps" in text
    assert "generate 7s, eta 4:23" in text
    assert text.endswith("\x1b[2K")  # the bar's line is erased
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_the_terminal_is_given_back_when_a_phase_raises() -> None:
    out = io.StringIO()
    with (
        pytest.raises(RuntimeError),
        Console(out, interactive=True) as console,
        console.phase("generate"),
    ):
        raise RuntimeError
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")


def test_every_metric_shown_is_documented() -> None:
    documented = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    shown = [name for _, name, _ in STEP_FIELDS] + [
        f"timing_s/{p}" for _, phases in STEP_PHASES for p in phases
    ]
    assert [name for name in shown if f"`{name}`" not in documented] == []
