"""Needed beside found, on machines that are described, not had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.weights import sparse_weights

from rlhf3d import preflight as module
from rlhf3d.config.load import build
from rlhf3d.config.schema import Config
from rlhf3d.machine import Machine, read_machine
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.planning.measured import DEFAULT, write_measured
from rlhf3d.planning.plan import Plan, make_plan
from rlhf3d.planning.view import show_memory
from rlhf3d.preflight import cluster_here, preflight
from rlhf3d.units import GIB

LAPTOP = Machine(
    cores=2,
    memory_gib=24.0,
    memory_available_gib=20.0,
    shared_memory_gib=12.0,
    disk_gib=50.0,
    gpus=(),
    compiler="c++",
)
MODELS = Path(__file__).parents[2] / "configs" / "models"
QWEN_7B = load_spec(MODELS / "Qwen2.5-7B-Instruct", with_weights=False)
SMOLLM2 = load_spec(MODELS / "SmolLM2-135M-Instruct", with_weights=False)


def make(folder: Path, spec: ModelSpec = SMOLLM2, **raw: dict) -> Config:
    description = {
        "model_type": spec.family,
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.ffn_size,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": spec.tie_embeddings,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(description))
    sparse_weights(folder)
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


def test_quickstart_fits_a_laptop(tmp_path: Path, machine: list[Machine]) -> None:
    assert preflight(make(tmp_path, actor={"layout": {"pp": 2, "dp": 2}})) == []


def test_nodes_of_a_cluster_share_what_cpu_ranks_hold(
    tmp_path: Path, machine: list[Machine]
) -> None:
    machine[0] = replace(LAPTOP, memory_available_gib=12.0)
    layout = {"actor": {"layout": {"pp": 2, "dp": 8}}}
    (problem,) = preflight(make(tmp_path, **layout))
    assert problem.startswith("host memory: needs about")
    assert (
        preflight(make(tmp_path, **layout, cluster={"ray_address": "head:1", "num_nodes": 4})) == []
    )


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
    # 8 training and 8 engine processes of 4 GiB; two models of 7.6 (the critic: 7.1) billion
    # parameters at 14 bytes.
    terms = (
        "driver 0.6, weight sync 0.5, training processes 32.0, engine processes 32.0, "
        "copies to save 191.5"
    )
    assert memory.startswith(f"host memory: needs about 256.6 GiB ({terms}), found 20.0 GiB")
    assert shm.startswith("/dev/shm: needs about 8.5 GiB, found 6.0 GiB")
    assert disk.startswith("disk: 2 checkpoints of 191.5 GiB")


def test_small_gpus_are_refused(tmp_path: Path, machine: list[Machine]) -> None:
    layout = {"layout": {"tp": 2, "pp": 2, "dp": 2}}
    node = replace(LAPTOP, memory_available_gib=900.0, shared_memory_gib=400.0, disk_gib=4000.0)
    config = make(tmp_path, QWEN_7B, actor=layout, cluster={"platform": "cuda"})
    machine[0] = replace(node, gpus=(("A100", 40.0),) * 8)
    (problem,) = preflight(config)
    assert problem.startswith("device memory: update_critic on device 0 (actor pp0) needs ")
    assert "more than the 40.0 of a device; largest: vLLM 20.0, " in problem
    shown: list[Plan] = []
    preflight(config, show=shown.append)
    assert shown[0].memory.problems == (problem,)
    machine[0] = replace(node, gpus=(("H200", 140.0),) * 8)
    assert preflight(config) == []


def test_the_plan_is_for_the_gpus_that_are_here(
    tmp_path: Path, machine: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own numbers, and what was measured on them.

    A file of measurements that is broken is reported.
    """
    monkeypatch.chdir(tmp_path)
    config = make(
        tmp_path, QWEN_7B, cluster={"platform": "cuda"}, rollout={"gpu_memory_utilization": 0.2}
    )
    machine[0] = replace(LAPTOP, gpus=(("NVIDIA A100-SXM4-80GB", 79.2),))
    shown: list[Plan] = []
    assert any("device memory" in problem for problem in preflight(config, shown.append))
    assert shown[0].job.cluster.hardware.batched_tokens == 8192  # as vLLM takes on an A100
    write_measured(
        DEFAULT, "NVIDIA A100-SXM4-80GB", "a test", {"process_gib": 1.5, "memory_gib": 10}
    )
    preflight(config, shown.append)
    assert shown[1].memory.ranks[0].resident["process"] == 1.5 * GIB
    assert shown[1].job.cluster.hardware.memory_gib == 79.2  # what the machine has counts
    DEFAULT.write_text("{}")
    assert any(
        problem.startswith("runs/gpu_measured.json: expected") for problem in preflight(config)
    )


def test_tight_memory_is_shown_and_no_reason_against_a_run(
    tmp_path: Path, machine: list[Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = {"placement": "disaggregated"}  # whose engine does not share the GPU's memory
    cluster = {"platform": "cuda", "gpus_per_node": 2}
    config = make(
        tmp_path,
        QWEN_7B,
        cluster=cluster,
        rollout=rollout,
        actor={"ppo_micro_batch_size_per_gpu": 1},
    )
    big = replace(
        LAPTOP,
        gpus=(("NVIDIA H100 80GB HBM3", 1000.0),) * 2,
        memory_available_gib=1000.0,
        disk_gib=1000.0,
    )
    shown: list[Plan] = []
    machine[0] = big
    assert preflight(config, shown.append) == [] and shown == []
    here = cluster_here(config.cluster, True, big.gpus[0])
    peak = make_plan(config, QWEN_7B, here).memory.ranks[0].peak.total / GIB
    machine[0] = replace(big, gpus=(("NVIDIA H100 80GB HBM3", peak + 0.5),) * 2)
    assert preflight(config, shown.append) == []
    assert [plan.verdict for plan in shown] == ["tight"]
    show_memory(shown[0])
    assert "warning: device memory: " in capsys.readouterr().err.replace("\n", " ")


def test_what_auto_becomes_is_checked(tmp_path: Path, machine: list[Machine]) -> None:
    budget = {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 1000}
    data = {
        "train_files": str(tmp_path / "t.parquet"),
        "max_prompt_length": 500,
        "max_response_length": 500,
    }
    config = make(tmp_path, actor=budget, data=data, rollout={"kv_cache_gib": 0.5})
    assert preflight(config) == []
    machine[0] = replace(LAPTOP, gpus=(("NVIDIA H100 80GB HBM3", 79.1),))
    assert any(
        "rounded up to a multiple of 128 = 1024 tokens" in problem for problem in preflight(config)
    )


def test_a_group_of_its_own_is_counted_and_named(tmp_path: Path, machine: list[Machine]) -> None:
    critic = {"layout": {"tp": 2, "dp": 2}, "placement": "disaggregated"}
    raw: dict = {"actor": {"layout": {"tp": 4}}, "critic": critic}
    config = make(tmp_path, QWEN_7B, **raw, cluster={"platform": "cuda", "gpus_per_node": 8})
    node = replace(LAPTOP, memory_available_gib=900.0, shared_memory_gib=400.0, disk_gib=4000.0)
    machine[0] = replace(node, gpus=(("A100", 40.0),) * 7)
    gpus, beside, apart = preflight(config)
    assert "needs 8 GPUs" in gpus and "actor group TP4×PP1×DP1, critic group TP2×PP1×DP2" in gpus
    assert beside.startswith("device memory: update_actor on device 0 (actor pp0) needs ")
    assert (
        apart.startswith("device memory: update_critic on device 4 (critic pp0) needs ")
        and "vLLM" not in apart
    )
    together = replace(config, critic=replace(config.critic, placement="colocated"))
    (problem,) = preflight(together)
    assert "on device 0 (actor pp0, critic pp0)" in problem
    dtypes: dict = {
        "model": {"path": str(tmp_path), "dtype": "bfloat16"},
        "rollout": {"dtype": "bfloat16"},
    }
    small = make(tmp_path, actor={"layout": {"pp": 2}}, critic={"layout": {"dp": 3}}, **dtypes)
    machine[0] = replace(LAPTOP, memory_available_gib=3.0)
    (memory,) = preflight(small)
    # Each of 2 stages holds the tied embeddings, 81 M parameters at 18 bytes; each of 3 replicas
    # all at 2 + 4 + 12 / 3.
    assert "(actor group 3.5, critic group 5.0, engines 2.3), found 3.0" in memory


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
