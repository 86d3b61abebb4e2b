"""The layers that GPUs train with.

Transformer Engine's own Python over stand-ins for its kernels, on CPU ranks.

It and Megatron are those of the GPU set. An update and a resumed one give what the CPU set's
Megatron gives with its local layers, so weights are where the table says, and Megatron's and
Transformer Engine's code is called as it wants to be. Its kernels, its fused attention and speed
are not tested.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import gpu_set, te_kernels
from support.checkpoints import load_tensors, same_tensors
from support.ranks import run_ranks
from support.saving import STEPS_BEFORE, load_and_save, train_and_save
from support.te_runs import TransformerEnginePlatform
from support.tiny_models import make_tiny_model
from support.updates import (
    PPO,
    SEQUENCES,
    Case,
    Update,
    assemble,
    compare,
    full_weights,
    one_process,
    run_updates,
)

import megatron_patches
from rlhf3d.checkpoints.convert import Options, plan_conversion
from rlhf3d.parallel.layout import ParallelLayout

ROOT = Path(__file__).parents[2]
TE = TransformerEnginePlatform("test")
UPDATES = {
    str(case) + " packed" * packed: (case, packed)
    for case, packed in (
        (Case(platform=TE), False),
        (Case(tp=2, pp=2, sp=True, recompute="selective", platform=TE), False),
        (Case(dp=2, overlap=True, gather=True, model="normed", platform=TE), True),
        (Case(tp=2, sp=True, offload=True, model="normed", platform=TE), True),
        (Case(dp=2, ep=2, model="experts", platform=TE), False),
        (Case(tp=2, ep=2, sp=True, recompute="full", model="experts", platform=TE), True),
    )
}
SAVED = {
    str(case): case
    for case in (
        Case(tp=2, dp=2, platform=TE),
        Case(dp=2, distributed_optimizer=False, dtype="bfloat16", platform=TE),
    )
}
LOCAL = Case(pp=2)
CONVERTED = {"heads4": ParallelLayout(tp=2, pp=2), "experts": ParallelLayout(dp=2, ep=2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied Llama, a Qwen3 with its norms of queries and keys, and a mixture of experts."""
    root = tmp_path_factory.mktemp("models")
    return {
        "heads4": make_tiny_model(root / "h4", heads=4, kv_heads=2, layers=2),
        "normed": make_tiny_model(root / "normed", "qwen3", tie=False, layers=2),
        "experts": make_tiny_model(
            root / "moe", "qwen3_moe", tie=False, layers=2, vocab=115, norm_topk_prob=False
        ),
    }


def convert(source: Path, destination: Path, **options: Path) -> Path:
    plan_conversion(source, destination, Options(**options)).run()
    return destination


@pytest.fixture(scope="module")
def converted(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """By model: its converted Megatron checkpoint, and where ranks save what they loaded."""
    root = tmp_path_factory.mktemp("converted")
    return {
        name: (convert(folders[name], root / name) / "actor", root / f"{name} saved")
        for name in CONVERTED
    }


@pytest.fixture(scope="module")
def local(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A checkpoint of Megatron's local layers, and what its ranks return."""
    megatron_patches.apply("cpu")
    import rlhf3d.checkpoints.sharded
    import rlhf3d.engine.megatron_engine  # noqa: F401

    saved = tmp_path_factory.mktemp("local") / "saved"
    return saved, run_ranks(
        2, train_and_save, LOCAL, folders[LOCAL.model], None, saved, STEPS_BEFORE
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks save, by case."""
    return tmp_path_factory.mktemp("te")


@pytest.fixture(scope="module")
def computed(
    folders: dict[str, Path],
    converted: dict[str, tuple[Path, Path]],
    local: tuple[Path, list],
    saved: Path,
) -> dict[str, list]:
    """What the ranks of all jobs return."""
    folder = saved
    jobs: dict[str, tuple] = {}
    for name, (case, packed) in UPDATES.items():
        updates = {
            role: Update(replace(case.fixed, packed=packed), objective)
            for role, objective in PPO.items()
        }
        jobs[name] = (case.layout.world_size, run_updates, (case, folders[case.model], updates))
    for name, case in SAVED.items():
        size, model = case.layout.world_size, folders[case.model]
        jobs[f"whole {name}"] = (
            size,
            train_and_save,
            (case, model, None, folder / name, STEPS_BEFORE),
        )
        jobs[f"resumed {name}"] = (size, train_and_save, (case, model, folder / name, None, 0))
    jobs["from local"] = (
        1,
        train_and_save,
        (Case(platform=TE), folders[LOCAL.model], local[0], None, 0),
    )
    for name, layout in CONVERTED.items():
        jobs[f"converted {name}"] = (
            layout.world_size,
            load_and_save,
            (TE, folders[name], layout, "policy", *converted[name]),
        )
    jobs["permutation"] = (
        1,
        te_kernels.compare_permutation,
        (gpu_set.folder("transformer-engine"),),
    )
    torch.save(jobs, folder / "jobs.pt")
    files = (folder / "jobs.pt", folder / "results.pt")
    command = [
        sys.executable,
        "-m",
        "support.te_runs",
        gpu_set.folder("transformer-engine"),
        *files,
    ]
    path = f"{gpu_set.folder('megatron-core')}:{ROOT}/tests:{ROOT}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-6000:]
    results: dict[str, list] = torch.load(folder / "results.pt", weights_only=False)
    return results


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, dict]:
    """The updates by Megatron's local layers in one process."""
    megatron_patches.apply("cpu")
    return {name: one_process(folder, PPO, SEQUENCES // 2) for name, folder in folders.items()}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_those_of_the_local_layers(
    name: str, computed: dict, references: dict[str, dict]
) -> None:
    case, _ = UPDATES[name]
    for role in PPO:
        metric, norm, weight = compare(
            assemble(case, computed[name], role), references[case.model][role]
        )
        print(f"TE {name} {role}: metrics {metric:.1e} grad-norm {norm:.1e} weights {weight:.1e}")


MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


@pytest.mark.parametrize("name", UPDATES)
def test_products_sum_the_gradients_of_all_matrices(name: str, computed: dict) -> None:
    """And of nothing else."""
    for result in computed[name]:
        for role in PPO:
            kinds = {".".join(weight.split(".")[-2:]) for weight in result[role]["fused"]}
            assert {re.sub(r"\d+$", "", kind) for kind in kinds} == set(MATRICES)


def test_experts_are_sorted_as_by_the_triton_kernels(computed: dict) -> None:
    assert computed["permutation"] == [
        dict.fromkeys(("permute", "unpermute", "sort", "sort back"), True)
    ]


def largest_difference(ours: list, theirs: list, role: str) -> float:
    """Of weights after the last update."""
    mine, other = (
        full_weights([result[role]["weights"] for result in results]) for results in (ours, theirs)
    )
    assert mine.keys() == other.keys()
    return max(float((mine[name] - other[name]).abs().max()) for name in other)


@pytest.mark.parametrize("name", SAVED)
def test_goes_on_exactly_with_the_fused_optimizer(name: str, computed: dict) -> None:
    whole, resumed = computed[f"whole {name}"], computed[f"resumed {name}"]
    for role in PPO:
        assert largest_difference(resumed, whole, role) == 0
        assert resumed[0][role]["curve"] == whole[0][role]["curve"]


def test_goes_on_from_what_local_layers_saved(computed: dict, local: tuple[Path, list]) -> None:
    """A run can be moved from CPU ranks to GPUs."""
    for role in PPO:
        worst = largest_difference(computed["from local"], local[1], role)
        print(f"TE from local layers, {role}: weights {worst:.1e}")
        assert worst < 1e-5


def test_local_layers_go_on_from_what_it_saved(
    computed: dict, folders: dict[str, Path], saved: Path
) -> None:
    """And from GPUs to CPU ranks, whose Megatron is older."""
    name, case = next(iter(SAVED.items()))
    resumed = run_ranks(
        LOCAL.layout.world_size, train_and_save, LOCAL, folders[case.model], saved / name, None, 0
    )
    for role in PPO:
        worst = largest_difference(resumed, computed[f"whole {name}"], role)
        print(f"local layers from TE, {role}: weights {worst:.1e}")
        assert worst < 1e-5


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.usefixtures("computed")
def test_converted_weights_come_back_to_the_bit(
    name: str, folders: dict[str, Path], converted: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The ranks that loaded and saved them in between compared each of their weights."""
    back = convert(converted[name][1], tmp_path / "back", reference=folders[name])
    assert same_tensors(load_tensors(back), load_tensors(folders[name]))
