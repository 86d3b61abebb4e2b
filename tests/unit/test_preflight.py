"""Needed beside found, on machines that are described, not had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf3d import preflight as module
from rlhf3d.config.derived import derive, resolve_dtypes
from rlhf3d.config.load import build
from rlhf3d.config.schema import Config
from rlhf3d.machine import GIB, Machine, read_machine
from rlhf3d.models.spec import ModelSpec
from rlhf3d.preflight import count_parameters, model_footprint, preflight

LAPTOP = Machine(
    cores=2,
    memory_gib=24.0,
    memory_available_gib=20.0,
    shared_memory_gib=12.0,
    disk_gib=50.0,
    gpus=(),
    compiler="c++",
)
QWEN_7B = ModelSpec(
    family="qwen2", num_layers=28, hidden_size=3584, num_heads=28, num_kv_heads=4, head_dim=128,
    ffn_size=18944, vocab_size=152064, qkv_bias=True,
)  # fmt: skip
SMOLLM2 = ModelSpec(
    family="llama", num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, ffn_size=1536,
    vocab_size=49152, tie_embeddings=True,
)  # fmt: skip


def make(folder: Path, spec: ModelSpec = SMOLLM2, **raw: dict) -> Config:
    description = {
        "model_type": spec.family, "num_hidden_layers": spec.num_layers, "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.ffn_size, "vocab_size": spec.vocab_size, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": spec.tie_embeddings, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "model.safetensors").touch()
    (folder / "t.parquet").touch()
    mistakes: list[str] = []
    always = {
        "model": {"path": str(folder)},
        "data": {"train_files": str(folder / "t.parquet")},
        "trainer": {"output_dir": str(folder / "runs" / "new")},
    }
    config = build(Config(), always | raw, "", mistakes)
    assert not mistakes
    return config


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """The machine that preflight reads, to be replaced."""
    present = [LAPTOP]
    monkeypatch.setattr(module, "read_machine", lambda output: present[0])
    return present


def test_parameter_counts_are_the_published_ones() -> None:
    assert count_parameters(SMOLLM2) == 134_515_008
    assert count_parameters(QWEN_7B) == 7_615_616_512


def test_footprint_by_hand() -> None:
    config = Config(actor=replace(Config().actor, layout=replace(Config().actor.layout, tp=2, pp=2, dp=2)))
    config = resolve_dtypes(config, "bfloat16")
    footprint = model_footprint(config, derive(config), {"actor": QWEN_7B})
    # actor and critic: weights 2 + gradients 4 + (Adam 8 + master 4) / 2 = 12 bytes each; no reference
    layer = (3584 + 2 * 512) // 2 * (3584 + 1) + 3584 * 1792 + 18944 * 3584 + 3584 * 9472 + 2 * 3584
    last_stage = 14 * layer + 152064 // 2 * 3584 + 3584
    assert footprint.per_rank_gib == {"actor": pytest.approx(last_stage * 24 / GIB)}
    assert footprint.weights_gib == pytest.approx(7_615_616_512 * 2 / GIB)
    assert footprint.checkpoint_gib == pytest.approx(2 * 7_615_616_512 * 14 / GIB)


def test_quickstart_fits_a_laptop(tmp_path: Path, machine: list[Machine]) -> None:
    assert preflight(make(tmp_path, actor={"layout": {"pp": 2, "dp": 2}})) == []


def test_cuda_job_names_what_is_needed_and_found(tmp_path: Path, machine: list[Machine]) -> None:
    config = make(
        tmp_path,
        QWEN_7B,
        actor={"layout": {"tp": 2, "pp": 2, "dp": 2}},
        rollout={"engines": 4, "tensor_parallel_size": 2},
        cluster={"platform": "cuda"},
        trainer={"save_freq": 10},
    )
    machine[0] = replace(LAPTOP, shared_memory_gib=6.0)
    gpus, memory, shm, disk = preflight(config)
    assert "needs 8 GPUs" in gpus
    assert "found 0" in gpus
    assert memory.startswith(
        "host memory: needs about 64.4 GiB (16 processes 64.0, weight syncs 0.4), found 20.0 GiB"
    )  # 16 x 4 + 2 x 3 buckets
    assert shm.startswith("/dev/shm: needs about 8.4 GiB, found 6.0 GiB")
    assert disk.startswith("disk: 2 checkpoint(s) of 198.6 GiB")


def test_small_gpus_are_refused(tmp_path: Path, machine: list[Machine]) -> None:
    layout = {"layout": {"tp": 2, "pp": 2, "dp": 2}}
    node = replace(LAPTOP, memory_available_gib=900.0, shared_memory_gib=400.0, disk_gib=4000.0)
    config = make(tmp_path, QWEN_7B, actor=layout, cluster={"platform": "cuda"})
    machine[0] = replace(node, gpus=(("A100", 40.0),) * 8)
    (problem,) = preflight(config)
    assert problem.startswith("GPU memory: model states of 42.6 GiB a rank")
    machine[0] = replace(node, gpus=(("H200", 140.0),) * 8)
    assert preflight(config) == []


def test_a_group_of_its_own_is_counted_and_named(tmp_path: Path, machine: list[Machine]) -> None:
    critic = {"layout": {"tp": 2, "dp": 2}, "placement": "disaggregated"}
    raw: dict = {"actor": {"layout": {"tp": 4}}, "critic": critic}
    config = make(tmp_path, QWEN_7B, **raw, cluster={"platform": "cuda", "gpus_per_node": 8})
    node = replace(LAPTOP, memory_available_gib=900.0, shared_memory_gib=400.0, disk_gib=4000.0)
    machine[0] = replace(node, gpus=(("A100", 40.0),) * 7)
    gpus, beside, apart = preflight(config)
    assert "needs 8 GPUs" in gpus and "actor group TP4×PP1×DP1, critic group TP2×PP1×DP2" in gpus
    assert beside.startswith("GPU memory: model states of 31.9 GiB a rank (actor 31.9) + rollout.gpu_memory")
    assert apart.startswith("GPU memory: model states of 42.6 GiB a rank (critic 42.6), found 40.0 GiB; raise critic.")
    together = replace(config, critic=replace(config.critic, placement="colocated"))
    (problem,) = preflight(together)
    assert "(actor 31.9 + critic 42.6) + rollout.gpu_memory_utilization" in problem
    dtypes: dict = {"model": {"path": str(tmp_path), "dtype": "bfloat16"}, "rollout": {"dtype": "bfloat16"}}
    small = make(tmp_path, actor={"layout": {"pp": 2}}, critic={"layout": {"dp": 3}}, **dtypes)
    machine[0] = replace(LAPTOP, memory_available_gib=3.0)
    (memory,) = preflight(small)
    # Each of 2 stages holds the tied embeddings, 81 M parameters at 18 bytes; each of 3 replicas all at 2 + 4 + 12 / 3.
    assert "(actor group 3.5, critic group 5.0, engines 3.5), found 3.0" in memory


def test_laptop_that_is_too_small(tmp_path: Path, machine: list[Machine]) -> None:
    machine[0] = replace(LAPTOP, memory_available_gib=3.0, shared_memory_gib=0.06, disk_gib=0.1)
    kinds = [problem.split(":")[0] for problem in preflight(make(tmp_path))]
    assert kinds == ["host memory", "/dev/shm", "disk"]


def test_missing_model_and_gpus_are_told_together(tmp_path: Path, machine: list[Machine]) -> None:
    config = make(tmp_path, cluster={"platform": "cuda"})
    problems = preflight(replace(config, model=replace(config.model, path="gone")))
    assert any(problem.startswith("model.path: no folder 'gone'") for problem in problems)
    assert any("found 0" in problem for problem in problems)


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    machine = read_machine(tmp_path / "not" / "there" / "yet")
    assert machine.cores >= 1
    assert 0 < machine.memory_available_gib <= machine.memory_gib
    assert machine.disk_gib > 0
    assert not (tmp_path / "not").exists()
