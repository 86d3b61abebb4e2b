"""Which checkpoints go, and what is left after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.checkpoints.manifest import MANIFEST
from rlhf3d.checkpoints.store import Store, expendable


def add(store: Store, step: int) -> Path:
    partial = store.begin(step)
    (partial / MANIFEST).write_text("{}")
    return store.publish(step, partial)


@pytest.mark.parametrize(
    ("last", "best", "gone"),
    [
        (None, 0, []),
        (None, 1, []),
        (1, 0, [10, 20, 30, 40]),
        (2, 0, [10, 20, 30]),
        (9, 0, []),
        (1, 1, [10, 30, 40]),
        (2, 2, [10]),
        (1, 9, [10, 40]),
    ],
)
def test_keeps_the_newest_and_the_best(last: int | None, best: int, gone: list[int]) -> None:
    assert expendable([10, 20, 30, 40, 50], last, best, {20: 0.9, 30: 0.7, 50: 0.1}) == gone


def test_of_equal_metrics_the_newer_is_kept() -> None:
    assert expendable([1, 2, 3, 4], 1, 1, {1: 0.5, 2: 0.5, 3: 0.4}) == [1, 3]


def test_publishes_and_removes_by_renaming(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (2, 4, 10):
        add(store, step)
    assert store.steps() == [2, 4, 10] and (tmp_path / "latest").read_text() == "step_10"
    assert store.keep(2, 0, {}) == [2] and store.steps() == [4, 10]
    add(store, 10)
    assert store.steps() == [4, 10] and store.clean() == []


def test_leftovers_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    store = Store(tmp_path)
    add(store, 2)
    (store.begin(4) / MANIFEST).write_text("{}")
    (tmp_path / "step_1.deleted").mkdir()
    (tmp_path / "latest.partial").write_text("step_4")
    (tmp_path / "step_6").mkdir()
    assert store.steps() == [2]
    assert store.clean() == ["latest.partial", "step_1.deleted", "step_4.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_2", "step_6"]
