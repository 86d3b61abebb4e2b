"""What a path holds: the roots of Megatron-LM's trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.checkpoints.locate import kind_of, megatron_folder


def make_root(root: Path, tracker: str | None, *folders: str) -> Path:
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / ".metadata").touch()
    if tracker is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(tracker)
    return root


@pytest.mark.parametrize(("tracker", "newest"), [("100\n", "iter_0000100"), ("release", "release")])
def test_the_newest_iteration_of_a_root(tracker: str, newest: str, tmp_path: Path) -> None:
    root = make_root(tmp_path, tracker, "iter_0000020", newest)
    assert kind_of(root) == "megatron"
    assert megatron_folder(root, None) == root / newest
    assert megatron_folder(root / "iter_0000020", None) == root / "iter_0000020"


def test_roots_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"iter_0000300, the newest according to .*, is not there; copy it"
    ):
        megatron_folder(make_root(tmp_path / "a", "300", "iter_0000100"), None)
    with pytest.raises(ValueError, match="says 'soon': a number or 'release'"):
        megatron_folder(make_root(tmp_path / "b", "soon", "iter_0000100"), None)
    with pytest.raises(ValueError, match=r"give one of its folders, for example .*iter_0000100"):
        kind_of(make_root(tmp_path / "c", None, "iter_0000020", "iter_0000100"))
    (tmp_path / "d" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="--ckpt-format torch_dist"):
        kind_of(tmp_path / "d")
