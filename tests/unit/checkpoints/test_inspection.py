"""`rlhf3d inspect`: what a folder holds, and every damaged file by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support.checkpoints import load_tensors, write_megatron_folder
from support.tiny_models import make_tiny_model
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.checkpoints.inspection import inspect
from rlhf3d.checkpoints.manifest import Manifest, infos_below, write_manifest
from rlhf3d.models.spec import load_spec
from rlhf3d.parallel.layout import ParallelLayout


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one whole checkpoint, its manifest with checksums, and one that was not
    finished.
    """
    hf = make_tiny_model(tmp_path / "model", layers=2, vocab=101)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_3"
    write_megatron_folder(
        checkpoint / "actor", load_tensors(hf), load_spec(hf), ParallelLayout(tp=2)
    )
    (checkpoint / "config.yaml").write_text(
        f"model: {{path: {hf}}}\nactor: {{layout: {{tp: 2, pp: 1, dp: 4, vpp: null}}}}"
    )
    files = infos_below(checkpoint, {})
    write_manifest(
        checkpoint, Manifest(3, 6, ("actor",), optimizer=False, metric={"acc": 0.5}, files=files)
    )
    (tmp_path / "run" / "checkpoints" / "step_4.partial").mkdir()
    return tmp_path / "run"


def command(path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    done = CliRunner().invoke(cli.app, ["inspect", str(path), "--json", *options])
    return done.exit_code, json.loads(done.stdout), done.stderr


def test_whole_folders(run: Path) -> None:
    code, found, _ = command(run, "--deep")
    assert code == 0 and found["steps"] == [3] and found["unfinished"] == ["step_4.partial"]
    latest = found["latest"]
    assert (latest["step"], latest["policy_version"], latest["metric"]) == (3, 6, {"acc": 0.5})
    assert latest["layout"] == {"actor": {"tp": 2, "pp": 1, "dp": 4}}
    tensors = load_tensors(run.parent / "model")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    for model in (latest["actor"], inspect(run.parent / "model")):
        assert (
            model["family"] == "llama"
            and model["parameters"] == parameters
            and model["dtypes"] == ["float32"]
        )
    assert latest["actor"]["optimizer"] is False and latest["actor"]["role"] == "actor"
    text = CliRunner().invoke(cli.app, ["inspect", str(run)]).stdout
    assert "metric: acc 0.5" in text and "layout: actor tp2×pp1×dp4" in text
    assert text.endswith(
        "nothing is missing; not compared: contents of files (--deep reads them)\n"
    )
    for path in (run, run.parent / "model"):
        assert (
            CliRunner()
            .invoke(cli.app, ["inspect", str(path), "--deep"])
            .stdout.endswith("\ncomplete\n")
        )


def test_damage_is_named_with_exit_code_1(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_3"
    file = checkpoint / "actor" / "__1_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert command(run)[0] == 0  # sizes agree
    for path in (run, checkpoint):
        code, found, told = command(path, "--deep")
        assert (
            code == 1
            and f"{file} has other contents than were written" in told
            and len(found["problems"]) == 1
        )
    os.truncate(file, 100)
    code, _, told = command(checkpoint)
    assert code == 1 and f"{file} has 100 bytes, not {len(whole)}" in told
    code, _, told = command(checkpoint / "actor")
    assert code == 1 and f"{file} is cut off" in told
    file.unlink()
    assert f"{file} cannot be read" in command(checkpoint)[2]
    (checkpoint / "manifest.json").unlink()
    code, _, told = command(checkpoint)
    assert code == 1 and "has no manifest.json" in told
    code, _, told = command(run)
    assert code == 1 and "no complete checkpoint" in told


def test_bare_megatron_folder_is_checked_by_its_own_checksums(run: Path) -> None:
    actor = run / "checkpoints" / "step_3" / "actor"
    for other in ("manifest.json", "config.yaml"):
        (actor.parent / other).unlink()
    file = actor / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    tensor = load_tensors(run.parent / "model")["model.layers.1.mlp.gate_proj.weight"][64:]
    at = bytes(content).index(tensor.numpy().tobytes())
    content[at + 8] ^= 1
    file.write_bytes(content)
    code, found, _ = command(actor)
    assert code == 0 and "family" not in found
    assert (
        found["not_compared"][1]
        == f"tensors of {actor} with those of a model (there is no config.json beside it)"
    )
    code, _, told = command(actor, "--deep")
    assert code == 1 and f"{file} is corrupt" in told


def test_hugging_face_folder_that_is_not_whole(run: Path) -> None:
    model = run.parent / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    code, _, told = command(model)
    assert code == 1 and "missing: model.layers.2.mlp.up_proj.weight [128, 64]" in told
    (model / "config.json").write_text(json.dumps(config))
    os.truncate(model / "model.safetensors", 1000)
    assert command(model)[0] == 1


def test_values_that_are_not_finite_are_found_where_they_are_read(run: Path) -> None:
    model = run.parent / "model"
    tensors = load_tensors(model)
    tensors["model.norm.weight"][:2] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert command(model)[0] == 0
    code, _, told = command(model, "--deep")
    assert code == 1 and "model.norm.weight has 2 values that are NaN or infinite" in told
