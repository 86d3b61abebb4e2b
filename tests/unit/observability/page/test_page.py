"""The page: what is on it, of whole runs and odd ones, and that text stays text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.page_runs import (
    healthy_rows,
    sample,
    setup,
    trajectory,
    with_validation,
    write_answers,
    write_rows,
)

from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.outcome import RunRecord
from rlhf3d.observability.page.charts import POINTS
from rlhf3d.observability.page.collect import RunFacts, Setting, collect, names_of, read_rows
from rlhf3d.observability.page.render import render
from rlhf3d.observability.samples import write_samples
from rlhf3d.observability.tokens import write_tokens

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> <!-- & \ud800 \x00 `x`"


class Parsed(HTMLParser):
    """Elements and the text of scripts, as a browser reads them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}
        self.scripts: list[str] = []
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements[tag] = self.elements.get(tag, 0) + 1
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def page_of(*runs: Path, facts: RunFacts | None = None) -> str:
    """The page, as it is written."""
    views = [
        collect(run, name, read_rows(run), facts or RunFacts(), len(runs))
        for run, name in names_of(runs).items()
    ]
    return render(views).encode("utf-8", "backslashreplace").decode()


def write_run(folder: Path, steps: int = 30, text: str = "it is 42") -> Path:
    rows = healthy_rows(steps)
    rows[0], rows[-1] = with_validation(rows[0], 0.2), with_validation(rows[-1], 0.6)
    write_rows(folder, rows)
    for step in (1, steps):
        write_answers(
            folder, step, {f"6 * 7? {text}": [(text, 0.0), ("42", 1.0)], "2?": [("2", 1)]}
        )
        write_samples(folder, step, [sample("held out?", text, step / steps)], "greedy")
    write_tokens(folder, steps, [trajectory(0, 0.1), trajectory(1, 1.5, ["a", text, "c"])])
    return folder


def test_the_page_of_a_run(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path / "sums"))
    data = Parsed(html).data
    assert "It is learning" in html and "It is healthy" in html and "<h1>sums</h1>" in html
    charts = {chart["id"]: chart for chart in data["charts"]}
    assert list(charts)[:4] == ["reward", "held_out", "kl", "entropy"]
    accuracy = charts["held_out"]["lines"][0]
    assert (accuracy["label"], accuracy["steps"], accuracy["raw"]) == (
        "math greedy",
        [1, 30],
        [0.2, 0.6],
    )
    assert accuracy["low"][0] < 0.2 < accuracy["high"][0]
    line = charts["reward"]["lines"][0]
    assert len(line["steps"]) == len(line["raw"]) == len(line["mean"]) == 30
    assert line["low"][10] < line["mean"][10] < line["high"][10]
    assert data["phases"][0]["parts"]["generate"][3] > 5
    assert data["spreads"][0]["score"]["shares"] and len(data["spreads"][0]["score"]["labels"]) == 2
    (first, last) = data["groups"][0]
    assert (first["step"], last["step"], last["more"]) == (1, 30, 0)
    assert [len(group["answers"]) for group in last["groups"]] == [2, 1]


def test_the_worst_token_is_first(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_tokens(tmp_path, 7, [trajectory(4, 2.5)])
    shown = Parsed(page_of(tmp_path)).data["trajectories"][0]
    assert [(one["step"], one["number"]) for one in shown] == [(7, 4), (30, 0), (30, 1)]
    text, _, author, version, engine, trainer, difference = shown[0]["tokens"][shown[0]["worst"]]
    assert (text, author, version, engine, trainer) == (" think", "sampled", 3, -0.5, -3.0)
    assert difference == 2.5


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    """Prompts, answers, tokens, names, settings: the page has the elements of a tame one."""
    tame, wild = tmp_path / "tame", tmp_path / "<b>&run"
    write_run(tame)
    write_run(wild, text=HOSTILE)
    setting = Setting("a.b", HOSTILE, HOSTILE, HOSTILE)
    wild_setup = setup(about=HOSTILE, scoring=HOSTILE)
    facts = RunFacts(
        [setting],
        HOSTILE,
        HOSTILE,
        {HOSTILE: HOSTILE},
        [(0, HOSTILE)],
        RunRecord(9, "failed", HOSTILE),
        wild_setup,
        None,
        HOSTILE,
    )
    plain = RunFacts(
        [Setting("a.b", "1", "2", "x")],
        "x",
        "x",
        {"x": "1"},
        [(0, "x")],
        RunRecord(9, "failed", "x"),
        setup(),
        None,
        "x",
    )
    found, expected = Parsed(page_of(wild, facts=facts)), Parsed(page_of(tame, facts=plain))
    # Long keys and values may be broken into lines.
    assert found.elements | {"wbr": 0} == expected.elements | {"wbr": 0}
    assert found.scripts[1:] == expected.scripts[1:]
    answer = found.data["groups"][0][0]["groups"][0]["answers"][0]["text"]
    assert answer == HOSTILE
    assert "alert(1)</script>" not in page_of(wild, facts=facts)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path))
    assert "default-src 'none'" in html
    links = re.findall(r'(?:src|href|action)="([^"]*)"', html)
    assert all(link.startswith(("#", "data:")) for link in links)


def test_a_long_run_fits(tmp_path: Path) -> None:
    rows = healthy_rows(2500)
    rows[1700]["actor/grad_norm"] = 99.0
    write_rows(tmp_path, rows)
    for step in range(1, 2501, 250):
        write_samples(tmp_path, step, [sample("p" * 3000, "a" * 20_000, 0.5) for _ in range(48)])
    html = page_of(tmp_path)
    assert len(html.encode()) < 3_000_000
    lines = {chart["id"]: chart["lines"][0] for chart in Parsed(html).data["charts"]}
    assert len(lines["reward"]["steps"]) <= POINTS and lines["reward"]["steps"][-1] == 2500
    assert max(lines["grad_norm"]["raw"]) == 99.0
    assert re.search(r"stands for\s+3\s+steps", html)
    assert "characters more" in html
    answer = Parsed(html).data["groups"][0][0]["groups"][0]["answers"][0]
    assert len(answer["text"]) + answer["left_out"] == 20_000


def test_runs_side_by_side(tmp_path: Path) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    write_run(one)
    write_rows(two, healthy_rows(60, seed=1))
    write_rows(three, [{"step": 1, "critic/score/mean": 0.5}])
    html = page_of(one, two, three)
    data = Parsed(html).data
    lines = {chart["id"]: [line["run"] for line in chart["lines"]] for chart in data["charts"]}
    assert lines["reward"] == [0, 1, 2] and lines["held_out"] == [0] and lines["entropy"] == [0, 1]
    assert data["runs"] == ["one", "two", "three"] and html.count("Is it learning?") == 3


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_rows(tmp_path / part / "run", healthy_rows(3)) for part in "ab"]
    assert names_of([runs[0], runs[0]]) == {runs[0]: "run"}
    data = Parsed(page_of(*runs, runs[0])).data
    assert data["runs"] == [str(run.resolve()) for run in runs]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "timing_s/validate": 3.0, "timing_s/step": 3.0}],
        [{"step": 1}],
        [{"step": 1, "critic/score/mean": float("nan"), "response_length/mean": float("inf")}],
        healthy_rows(1),
        healthy_rows(3),
        [{"step": 5, "critic/score/mean": 0.1}, {"step": 90, "actor/entropy": 2}],
    ],
)
def test_odd_runs_have_a_page(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "critic/sc')  # being written
    data = Parsed(page_of(tmp_path)).data
    assert data["groups"] == [[]] and data["trajectories"] == [[]]


def test_no_run_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        read_rows(tmp_path)
    MetricsWriter(tmp_path).close()
    with pytest.raises(ValueError, match="no finished step yet"):
        read_rows(tmp_path)


@pytest.mark.parametrize("line", [b'{"prompt": 3', b"[]", b"\xff\xfe", b'{"prompt": "x"}', b"3"])
@pytest.mark.parametrize(
    "name", ["step_30.jsonl", "greedy_step_30.jsonl", "tokens_step_30.jsonl", "../metrics.jsonl"]
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, line: bytes) -> None:
    file = write_run(tmp_path) / "samples" / name
    with file.open("ab") as damaged:
        damaged.write(line + b"\n")
    with pytest.raises(ValueError, match=rf"{file.resolve().name} line \d+ is "):
        page_of(tmp_path)


@pytest.mark.parametrize(
    ("scores", "worths"),
    [((0.0, 0.25, 1.0), [0, 25, 100]), ((-3.0, 0.0, 5.0), [0, 38, 100]), ((0.1, 0.1), [10, 10])],
)
def test_the_color_of_an_answer_is_its_score(
    tmp_path: Path, scores: tuple[float, ...], worths: list[int]
) -> None:
    """From the least to the most; right and wrong where all lie between 0 and 1."""
    write_rows(tmp_path, healthy_rows(1))
    failed = replace(sample("p", "x", 0.0), outcome="timeout", score=0.0)
    write_samples(tmp_path, 1, [*(sample("p", "x", score) for score in scores), failed])
    (group,) = Parsed(page_of(tmp_path)).data["groups"][0][0]["groups"]
    assert [answer["worth"] for answer in group["answers"]] == [*worths, 0]
    assert group["answers"][-1]["mark"] == "timeout"
