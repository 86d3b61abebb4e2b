"""Conversion against the real parts.

Megatron-core saves and loads in many layouts, transformers loads; vLLM does in
`test_weight_writer.py`, which has an engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load_tensors, same_tensors
from support.ranks import run_ranks
from support.saving import load_and_save
from support.tiny_models import make_tiny_model

from rlhf3d.checkpoints.convert import Options, plan_conversion
from rlhf3d.checkpoints.verify import VerifyError, verify
from rlhf3d.models.spec import load_spec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform

PLATFORM = CPUPlatform(reason="test")
ROOT = Path(__file__).parents[2]
SHARD_GIB = 100_000 / 2**30
CASES: dict[str, tuple[dict[str, Any], list[ParallelLayout]]] = {
    "llama-tied-padded": (
        {"tie": True, "vocab": 101},
        [ParallelLayout(), ParallelLayout(tp=2, pp=2, vpp=2)],
    ),
    "qwen2": (
        {"family": "qwen2", "tie": False},
        [ParallelLayout(tp=2, pp=2, first_stage_layers=3)],
    ),
    "qwen3": ({"family": "qwen3", "tie": False, "vocab": 103}, [ParallelLayout(tp=2, dp=2)]),
    "mixtral": ({"family": "mixtral", "tie": False, "layers": 2}, [ParallelLayout(dp=2, ep=2)]),
    "qwen3_moe": (
        {"family": "qwen3_moe", "tie": True, "layers": 2, "vocab": 101},
        [ParallelLayout(tp=2, pp=2, dp=1, ep=2)],
    ),
    "critic": ({"tie": False, "vocab": 101}, [ParallelLayout(tp=2, pp=2)]),
}


def convert(source: Path, destination: Path, **options: Any) -> Path:
    plan_conversion(source, destination, Options(max_shard_gib=SHARD_GIB, **options)).run()
    return destination


def classifier(folder: Path, source: Path) -> Path:
    """A sequence classifier from a language model, with a random head."""
    tensors = load_tensors(source)
    tensors.pop("lm_head.weight", None)
    hidden = load_spec(source).hidden_size
    tensors["score.weight"] = torch.randn(1, hidden, generator=torch.Generator().manual_seed(3))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    changed = {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "value"},
        "label2id": {"value": 0},
    }
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders, by case."""
    root = tmp_path_factory.mktemp("models")
    made = {
        name: make_tiny_model(root / name, **model)
        for name, (model, _) in CASES.items()
        if name != "critic"
    }
    plain = make_tiny_model(root / "plain", **CASES["critic"][0])
    return made | {"critic": classifier(root / "critic", plain)}


def cases() -> list[Any]:
    """Each model in each of its layouts.

    The GPU set's Megatron names and stacks alike what a layer of the same kind has: in `make test`
    it runs a case of a dense model, of one of experts and of a critic.
    """
    made = []
    for name, (_, layouts) in CASES.items():
        for layout in layouts:
            chosen = name in ("qwen2", "qwen3_moe", "critic")
            mark = pytest.mark.gpu_set if chosen else pytest.mark.gpu_set_full
            made.append(pytest.param(name, layout, marks=mark, id=f"{name}-{layout}"))
    return made


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("name", "layout"), cases())
def test_megatron_loads_and_saves_what_is_converted(
    name: str, layout: ParallelLayout, folders: dict[str, Path], tmp_path: Path
) -> None:
    hf, role = folders[name], "value" if name == "critic" else "policy"
    folder = "critic" if name == "critic" else "actor"
    converted = convert(hf, tmp_path / "converted") / folder
    saved = tmp_path / "saved"
    assert all(
        run_ranks(layout.world_size, load_and_save, PLATFORM, hf, layout, role, converted, saved)
    )
    assert same_tensors(
        load_tensors(convert(saved, tmp_path / "back", reference=hf)), load_tensors(hf)
    )


def rlhf3d(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/convert_checkpoint.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_command_verifies_an_actor_in_bfloat16(folders: dict[str, Path], tmp_path: Path) -> None:
    megatron = convert(folders["llama-tied-padded"], tmp_path / "megatron")
    done = rlhf3d(str(megatron), str(tmp_path / "hf"), "--dtype", "bfloat16", "--verify", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    tensors = load_tensors(folders["llama-tied-padded"])
    assert report["verified"]["elements"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["verified"]["skipped"] is None and report["verified"]["max_logit_diff"] < 1e-5
    rounded = load_file(tmp_path / "hf" / "model.safetensors")
    assert same_tensors(rounded, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    # A changed element does not pass.
    name = "model.layers.2.self_attn.v_proj.weight"
    rounded[name][5, 7] += 1
    save_file(rounded, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyError, match=rf"{name}\[0:16, 0:64\] differs"):
        verify(megatron / "actor", tmp_path / "hf", "hf")


def test_critic_has_transformers_values(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of its weights rounded to bfloat16, as the folder that was made has them."""
    megatron = convert(folders["critic"], tmp_path / "megatron", dtype="bfloat16")
    proof = verify(megatron / "critic", folders["critic"], "megatron")
    assert (
        proof.skipped is None and proof.max_logit_diff is not None and proof.max_logit_diff < 1e-5
    )
