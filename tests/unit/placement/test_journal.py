"""The journal of a run: what is written reads back, whatever a kill leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf3d.placement.journal import (
    JOURNAL_FILE,
    Asked,
    Command,
    EngineJournal,
    JournalWriter,
    Made,
    asked,
    beginnings,
    made,
    name_of,
    read_journal,
    trajectory_of,
)
from rlhf3d.rollout.api import Completion, Request, SamplingSettings
from rlhf3d.rollout.engine_loop import Progress


def request(name: str = "b1.p0.s0.t0.a0", *ids: int, seed: int = 7) -> Request:
    return Request(ids or (1, 2, 3), seed, SamplingSettings(), name=name)


DONE = Completion((5, 6), (-0.5, -0.25), "stop", ((0, 3),))


def progress(*applied: tuple[int, int], **completions: Completion) -> Progress:
    """`completions` by "n" and the number."""
    done = {int(key[1:]): one for key, one in completions.items()}
    return Progress(done, 99, False, applied)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as journal:
        journal.begin(0, {"engines": 2})
        first, second = EngineJournal(journal, 0), EngineJournal(journal, 1)
        first.sent(1, "open_weights", ("a setup", 0, None))
        first.sent(2, "update_weights", (0, 0))
        first.sent(3, "publish", (0,))
        first.sent(4, "submit", ({10: request("a"), 11: request("b", 4, 5)},))
        second.sent(1, "submit", ({12: request("c")},))
        # Steps become known later, in parts, of one engine before the other.
        first.told(progress((1, 0), (2, 0)))
        second.told(progress((1, 0)))
        first.told(progress((3, 0), (4, 0)))
        first.sent(5, "abort", ([11],))
        first.told(progress((5, 8), n10=DONE))
        journal.trained(1, ["a", "c"])
        first.sent(6, "close", ())
        first.told(progress((6, 9)))
    (segment,) = read_journal(tmp_path)
    assert segment.begin == 0 and segment.facts == {"engines": 2}
    assert segment.schedules == {0: [0, 0, 0, 0, 8], 1: [0]}
    assert segment.commands[0] == [
        Command("open_weights"),
        Command("update_weights", version=0),
        Command("publish", version=0),
        Command("submit", requests=(asked(request("a")), asked(request("b", 4, 5)))),
        Command("abort", names=("b",)),
    ]
    assert segment.commands[1] == [Command("submit", requests=(asked(request("c")),))]
    assert segment.made == {"a": [made("a", DONE)]}
    assert segment.steps == {1: ("a", "c")} and segment.last_step == 1


def test_a_completion_that_was_aborted_is_no_completion(tmp_path: Path) -> None:
    seen: list[Made] = []
    with JournalWriter(tmp_path) as journal:
        engine = EngineJournal(journal, 0, seen.extend)
        engine.sent(1, "submit", ({10: request("a"), 11: request("b")},))
        engine.sent(2, "abort", ([10, 12],))
        engine.told(progress((1, 0), (2, 4), n10=DONE, n11=DONE))
    assert seen == [made("b", DONE)]


def test_digests_tell_every_bit_apart() -> None:
    """Prompt and seed of a request; tokens, log-probs, end and versions of a completion."""
    assert asked(request("a")) == Asked("a", 3, asked(request("b")).digest, 7)
    assert asked(request("a", 1, 2)).digest != asked(request("a")).digest
    others = [
        replace(DONE, token_ids=(5, 7)),
        replace(DONE, logprobs=(-0.5, -0.25 - 2**-25)),
        replace(DONE, finish_reason="length"),
        replace(DONE, versions=((0, 4),)),
        replace(DONE, versions=((0, 3), (1, 4))),
    ]
    digests = {made("a", one).digest for one in [DONE, *others]}
    assert len(digests) == len(others) + 1


def test_requests_without_a_name_go_by_seed_and_prompt() -> None:
    unnamed = request("")
    names = {name_of(one) for one in (unnamed, request("", 9), request("", seed=8))}
    assert trajectory_of(name_of(request(""))) == name_of(request(""))
    assert trajectory_of("b1.p0.s3.t2.a0") == "b1.p0.s3"
    assert len(names) == 3 and name_of(request("")) in names and name_of(request("a")) == "a"


def test_parts_of_a_run_and_what_a_kill_leaves(tmp_path: Path) -> None:
    file = tmp_path / JOURNAL_FILE
    with JournalWriter(tmp_path) as journal:
        journal.begin(0, {})
        journal.trained(1, [])
        journal.trained(2, [])
    with file.open("a") as torn:
        torn.write('{"trained":3,"traj')
    assert read_journal(tmp_path)[0].last_step == 2
    with JournalWriter(tmp_path) as journal:
        journal.begin(1, {})
        journal.trained(2, ["x"])
    first, second = read_journal(tmp_path)
    assert (first.begin, first.last_step, second.begin, second.last_step) == (0, 2, 1, 2)
    assert second.steps == {2: ("x",)}


def test_what_comes_after_a_restart_of_engines_is_left_out(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as journal:
        journal.begin(0, {})
        for step in (1, 2):
            engine = EngineJournal(journal, 0)
            engine.sent(1, "sleep", ())
            engine.told(progress((1, 0)))
            journal.trained(step, [])
            journal.restarted()
    (segment,) = read_journal(tmp_path)
    assert segment.restarted and segment.last_step == 1 and len(segment.commands[0]) == 1


def test_a_step_is_on_disk_when_it_is_complete(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.begin(0, {})
    journal.write({"engine": 0, "made": []})
    journal.trained(1, [])
    assert read_journal(tmp_path)[0].last_step == 1
    journal.close()


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "is empty"),
        ('{"begin":0,"facts":{}}\nnonsense\n', "line 2 is not JSON"),
        ('{"trained":1,"trajectories":[]}\n', "line 1 is damaged"),
        ('{"begin":0,"facts":{}}\n{"engine":0,"command":2,"step":0,"method":"x"}\n', "line 2"),
    ],
)
def test_a_damaged_journal_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text(text)
    with pytest.raises(ValueError, match=named):
        read_journal(tmp_path)


def test_a_folder_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=JOURNAL_FILE):
        read_journal(tmp_path)


def test_beginnings_are_read_without_the_rest(tmp_path: Path) -> None:
    assert beginnings(tmp_path) == []
    with JournalWriter(tmp_path) as journal:
        journal.begin(0, {"a": 1})
        journal.trained(1, ["x"])
        journal.begin(1, {"a": 2})
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"begin":9,"fa')
    assert beginnings(tmp_path) == [(0, {"a": 1}), (1, {"a": 2})]
