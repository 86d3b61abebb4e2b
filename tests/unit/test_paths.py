"""Where a path cannot be written is told before anything is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.paths import check_output, file_problem, folder_problem


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "nowhere")
    assert folder_problem(tmp_path / "a" / "b") is None
    for path in (file, file / "a" / "b"):
        assert folder_problem(path) == f"{file} is a file, not a folder"
    assert folder_problem(link / "a") == f"{link} is a link to what is not there"
    assert "name too long" in (folder_problem(tmp_path / ("x" * 300)) or "")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    assert folder_problem(tmp_path / "a") == f"{tmp_path} cannot be written to"


def test_files(tmp_path: Path) -> None:
    assert file_problem(tmp_path / "a" / "b.yaml") is None
    assert file_problem(tmp_path) == f"{tmp_path} is a folder, not a file"
    with pytest.raises(
        ValueError, match=f"--output {tmp_path}: {tmp_path} is a folder, not a file; name another"
    ):
        check_output("--output", tmp_path, is_file=True)
