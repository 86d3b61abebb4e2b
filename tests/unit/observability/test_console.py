"""Console output: plain text is exact and free of control characters.

What a terminal shows is tested in `live/`.
"""

from __future__ import annotations

import io
import os
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


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"actor/ppo_kl": 0.0, "actor/kl_loss": 0.02}, "kl_ref 0.0200"),
        ({"actor/reward_kl_penalty": 0.5, "actor/kl_loss": 0.02}, "kl_ref 0.5000"),
        ({"actor/ppo_kl": 0.003}, "kl 0.0030"),
    ],
)
def test_step_line_has_the_kl_to_the_reference_where_there_is_one(
    metrics: dict[str, float], shown: str
) -> None:
    assert step_line(metrics, 2, 9) == f"step 2/9 │ {shown}"


@pytest.mark.parametrize(
    ("variables", "live"),
    [({}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)],
)
def test_a_view_needs_a_terminal_that_can_show_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], live: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    master, terminal = os.openpty()
    with os.fdopen(master), os.fdopen(terminal, "w", encoding="utf-8") as file:
        assert Console(file)._interactive == live
    with open(os.devnull, "w", encoding="utf-8") as file:
        assert not Console(file)._interactive


def test_every_metric_shown_is_documented() -> None:
    documented = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    shown = [name for _, name, _ in STEP_FIELDS] + [
        f"timing_s/{p}" for _, phases in STEP_PHASES for p in phases
    ]
    assert [name for name in shown if f"`{name}`" not in documented] == []
