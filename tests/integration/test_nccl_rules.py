"""Megatron's schedules under NCCL's rules.

Pipelines, interleaved or not, send nothing that NCCL refuses or that has been freed, and the update
is that of one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import RankError, run_ranks
from support.tiny_models import make_tiny_model
from support.updates import (
    PPO,
    SEQUENCES,
    Case,
    Update,
    assemble,
    compare,
    one_process,
    run_updates,
)

import megatron_patches
from rlhf3d.parallel import nccl_rules
from rlhf3d.parallel.as_gpu import AsGPUPlatform

AS_GPU = AsGPUPlatform("test")
CASES = [
    Case(pp=2, platform=AS_GPU),
    Case(tp=2, pp=2, vpp=2, sp=True, platform=AS_GPU),
    Case(pp=2, cp=2, overlap=True, gather=True, platform=AS_GPU),
]
INTERLEAVED = Case(pp=2, vpp=2, platform=AS_GPU)
POLICY = {"policy": PPO["policy"]}


@pytest.fixture(scope="module", autouse=True)
def registered(megatron: None) -> None:
    """The back end, before ranks are forked."""
    nccl_rules.register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("models") / "model", heads=4, kv_heads=2, layers=4
    )


def update(case: Case) -> dict[str, Update]:
    return {
        name: Update(case.fixed, objective, SEQUENCES // 2) for name, objective in POLICY.items()
    }


@pytest.mark.parametrize("case", [*CASES, INTERLEAVED], ids=str)
def test_an_update_under_the_rules_is_that_of_one_process(case: Case, folder: Path) -> None:
    reference = one_process(folder, POLICY, SEQUENCES // 2)
    results = run_ranks(case.layout.world_size, run_updates, case, folder, update(case))
    compare(assemble(case, results, "policy"), reference["policy"])


def without_alias(rank: int, port: int, case: Case, folder: Path) -> None:
    from megatron.core.pipeline_parallel import p2p_communication

    p2p_communication._p2p_ops = p2p_communication._p2p_ops.__wrapped__
    run_updates(rank, port, case, folder, update(case))


def test_an_interleaved_pipeline_without_its_patch_sends_freed_activations(folder: Path) -> None:
    """Which arrive as NaN here, and on GPUs as whatever the memory is used for next."""
    (patch,) = (patch for patch in megatron_patches.PATCHES if patch.name == "isend_alias")
    if patch.not_needed_because("cpu", megatron_patches.installed_version()) is not None:
        pytest.skip("this version of megatron-core keeps what it sends")
    with pytest.raises(RankError, match="not finite"):
        run_ranks(2, without_alias, INTERLEAVED, folder)
