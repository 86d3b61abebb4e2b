"""What a page knows besides metrics: settings, the plan, starts; and the command that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.page_runs import healthy_rows, write_rows

from rlhf3d.commands.results import report
from rlhf3d.config.load import config_to_yaml, load_config
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.results.run_page import run_facts, write_page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 GPUs, resumed once."""
    folder = write_rows(tmp_path_factory.mktemp("runs") / "math", healthy_rows(20))
    (folder / "config.yaml").write_text(config_to_yaml(load_config("math.yaml")))
    with JournalWriter(folder) as journal:
        for step, version in ((0, "0.1.0"), (10, "0.2.0")):
            facts = {"versions": {"rlhf3d": version}, "started": "2026-01-02T03:04:05+05:30"}
            journal.begin(step, facts)
            journal.trained(step + 1, ["a"])
    return folder


def test_settings_that_differ_come_with_their_defaults(run: Path) -> None:
    facts = run_facts(run, healthy_rows(20))
    changed = {setting.key: setting for setting in facts.changed}
    assert "data.train_files" in changed and "trainer.seed" not in changed
    pp = changed["actor.layout.pp"]
    assert (pp.value, pp.default) == (str(load_config("math.yaml").actor.layout.pp), "1")
    assert "seed:" in facts.config and not facts.config_problem


def test_starts_and_versions_are_the_journals(run: Path) -> None:
    facts = run_facts(run, healthy_rows(20))
    when = "2026-01-02 03:04:05 UTC+05:30"
    assert facts.starts == [(0, when), (10, when)]
    assert facts.versions == {"rlhf3d": "0.2.0"}
    assert "resumed after step 10" in write_page([run], run / "page.html").read_text()


def test_the_plan_is_for_the_runs_own_lengths(run: Path) -> None:
    short = [{**row, "response_length/mean": 20.0} for row in healthy_rows(20)]
    long = [{**row, "response_length/mean": 900.0} for row in healthy_rows(20)]
    plans = [run_facts(run, rows).plan for rows in (short, long)]
    assert plans[0] is not None and plans[1] is not None
    assert plans[0].step_s < plans[1].step_s
    assert plans[0].phases["generate"] > 0 and plans[0].memory[0].gib > 1
    html = write_page([run], run / "page.html").read_text()
    assert "<th>measured ÷ planned</th>" in html and plans[0].hardware in html


def test_memory_is_beside_the_plan(run: Path, tmp_path: Path) -> None:
    rows = healthy_rows(20)
    rows[7] |= {"perf/rank_memory_gib": 61.25, "perf/host_memory_gib": 123.5}
    write_rows(tmp_path, rows)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    html = write_page([tmp_path], tmp_path / "page.html").read_text()
    table = html.partition("Memory, GiB")[2].partition("</table>")[0]
    # That of the fullest rank stands beside the highest plan only.
    assert table.count("61.25") == table.count("123.50") == 1
    plan = run_facts(run, rows).plan
    assert plan is not None
    fullest = max(place.gib for place in plan.memory)
    assert f"<td>{fullest:.2f}</td><td>61.25</td>" in table


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no config.yaml"),
        ("model: [", "config.yaml"),
        ("nonsense: 3", "nonsense"),
        ("model: {path: /nowhere/at-all}\ndata: {train_files: [x]}", "/nowhere/at-all"),
    ],
)
def test_what_cannot_be_found_out_is_said(tmp_path: Path, text: str | None, problem: str) -> None:
    write_rows(tmp_path, healthy_rows(3))
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    facts = run_facts(tmp_path, healthy_rows(3))
    assert facts.plan is None and problem in facts.plan_problem
    assert "No plan to compare with" in write_page([tmp_path], tmp_path / "x.html").read_text()


def test_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report([run])
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "report.md")]
    text = (run / "report.md").read_text()
    assert "Is it learning? **It is learning.**" in text
    other = write_rows(tmp_path / "other", healthy_rows(4))
    monkeypatch.chdir(tmp_path)
    report([run, other, run])
    assert capsys.readouterr().out.split() == ["report.html"]
    assert "<h1>2 runs</h1>" in Path("report.html").read_text()
    report([other], Path("one.html"))
    assert not (other / "report.html").exists() and Path("one.html").stat().st_size > 50_000
    with pytest.raises(ValueError, match="is not the folder of a run"):
        report([tmp_path])
    with pytest.raises(ValueError, match="--output"):
        report([run], tmp_path / "one.html" / "page.html")
