"""A manifest names every file that is not as it was written, and formats that it cannot read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf3d.checkpoints.manifest import (
    Manifest,
    infos_below,
    problems,
    read_manifest,
    versions,
    write_manifest,
)


def write(folder: Path) -> Manifest:
    """A checkpoint of two files."""
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "__0_0.distcp").write_bytes(os.urandom(1000))
    (folder / "driver.json").write_text("{}")
    manifest = Manifest(3, 2, ("actor",), True, {"acc": 0.5}, versions(), infos_below(folder, {}))
    write_manifest(folder, manifest)
    return manifest


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c")
    assert read_manifest(tmp_path / "c") == manifest and problems(tmp_path / "c", manifest) == []
    assert set(manifest.files) == {"actor/__0_0.distcp", "driver.json"}
    assert {"torch", "megatron-core", "rlhf3d"} <= set(manifest.versions)


def test_names_the_file_that_is_missing_short_or_changed(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    manifest = write(folder)
    shard = folder / "actor" / "__0_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    assert problems(folder, manifest) == [f"{shard} has other contents than were written"]
    assert problems(folder, manifest, contents=False) == []
    shard.write_bytes(data[:-1])
    assert problems(folder, manifest, contents=False) == [f"{shard} has 999 bytes, not 1000"]
    shard.unlink()
    assert problems(folder, manifest) == [f"{shard} cannot be read (No such file or directory)"]


def test_refuses_what_is_no_manifest_of_this_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json, so it is no complete checkpoint"):
        read_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"format_version": 1, "step": 3, "files": {"driver.json": 2}}))
    with pytest.raises(ValueError, match="has format_version 1, this rlhf3d reads 2"):
        read_manifest(tmp_path)
    for text in (
        "",
        "[]",
        "{}",
        '{"format_version": 2}',
        '{"format_version": 2, "files": {}, "models": [], "odd": 1}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a manifest"):
            read_manifest(tmp_path)
