"""Every patch is needed and works: upstream is wrong without it, and right with it."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.megatron_cases import CASES, train
from support.ranks import run_ranks

import megatron_patches
from rlhf3d.parallel.layout import ParallelLayout

pytestmark = pytest.mark.gpu_set
ROOT = Path(__file__).parents[2]
VERSION = megatron_patches.installed_version()
FIXED = [
    p.name for p in megatron_patches.PATCHES if p.not_needed_because("cpu", VERSION) is not None
]
"""Patches that this version of Megatron does not need."""

FAILURES = {
    "device": "Torch not compiled with CUDA|no NVIDIA driver|No CUDA GPUs",
    "rng_tracker": "Torch not compiled with CUDA|no NVIDIA driver|No CUDA GPUs",
    "norm_sequence_parallel": "sequence parallel not supported by torch LayerNorm",
    "moe_router_gemm": "name 'te_general_gemm' is not defined",
    "moe_split_sizes": "TypeError: all_to_all_single",
    "output_layer_fusion": "install APEX",
}
"""What upstream raises without the patch; the other patches cure wrong results."""


@pytest.fixture(scope="module")
def without() -> dict[str, dict[str, Any]]:
    """Outcome of every case with every patch but its own, from a fresh interpreter."""
    # First what this process has first.
    path = f"{os.environ.get('PYTHONPATH', '')}:{ROOT / 'tests'}:{ROOT}"
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.megatron_cases"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, check=False, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return outcomes


@pytest.fixture(scope="module")
def patched() -> None:
    """Megatron imported once here, with all patches, for the ranks forked from this process."""
    megatron_patches.apply("cpu")
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401


@pytest.fixture(scope="module")
def one_process(patched: None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of two steps on one rank."""
    steps: list[tuple[float, float]] = run_ranks(1, train, ParallelLayout(), 2)[0]
    return steps


def needed(*names: str) -> list[Any]:
    """Test parameters, those that this version does not need skipped."""
    skip = pytest.mark.skip(f"megatron-core {VERSION} does not need it")
    return [pytest.param(name, marks=skip if name in FIXED else ()) for name in names]


def with_patch(name: str) -> Any:
    """Result of the last rank of a case, all patches applied."""
    return run_ranks(CASES[name].world_size, CASES[name].run)[-1]


def test_every_patch_has_a_case() -> None:
    assert list(CASES) == [patch.name for patch in megatron_patches.PATCHES]


@pytest.mark.parametrize("name", needed(*FAILURES))
def test_upstream_fails_without(name: str, without: dict[str, dict[str, Any]]) -> None:
    assert re.search(FAILURES[name], without[name].get("error", "")), without[name]


@pytest.mark.parametrize("name", needed("isend_alias"))
def test_upstream_sends_freed_memory_without(name: str, without: dict[str, dict[str, Any]]) -> None:
    assert without[name]["value"] != 1.0


def test_upstream_leaves_a_process_behind_without_checkpoint_queue(
    without: dict[str, dict[str, Any]],
) -> None:
    assert without["checkpoint_queue"]["value"]["left"] > 0


@pytest.mark.usefixtures("patched")
def test_a_lone_replica_sends_nothing(without: dict[str, dict[str, Any]]) -> None:
    upstream, ours = without["lone_replica"]["value"], with_patch("lone_replica")
    assert upstream["sent"] and not ours["sent"]
    assert upstream["norms"] == ours["norms"]


@pytest.mark.usefixtures("patched")
def test_clipping_copies_no_gradient(without: dict[str, dict[str, Any]]) -> None:
    upstream, ours = without["clip_in_place"]["value"], with_patch("clip_in_place")
    assert upstream["copies"] - ours["copies"] == 2  # one a gradient
    assert upstream["gradients"] == ours["gradients"]


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("name", [name for name in FIXED if name != "isend_alias"])
def test_upstream_is_right_without_what_it_does_not_need(
    name: str, without: dict[str, dict[str, Any]]
) -> None:
    assert without[name].get("value") == with_patch(name), without[name]


@pytest.mark.usefixtures("patched")
@pytest.mark.skipif("isend_alias" not in FIXED, reason=f"megatron-core {VERSION} needs isend_alias")
def test_upstream_waits_for_a_send_before_it_frees_what_is_sent() -> None:
    """In both places that start one: warm-up and steady state."""
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_pipelining_with_interleaving as schedule,
    )

    source = inspect.getsource(schedule)
    waits = re.findall(
        r"config\.deallocate_pipeline_outputs:\n +send_next_wait_handle\.wait\(\)", source
    )
    assert len(waits) == source.count('fwd_wait_handles.pop("send_next")') == 2


@pytest.mark.usefixtures("patched")
def test_all_are_applied_once() -> None:
    applied = {row.name for row in megatron_patches.table() if row.status == "applied"}
    assert applied == {patch.name for patch in megatron_patches.PATCHES} - set(FIXED)
    finders = list(sys.meta_path)
    megatron_patches.apply("cpu")
    assert sys.meta_path == finders


@pytest.mark.usefixtures("patched")
def test_device(one_process: list[tuple[float, float]]) -> None:
    assert with_patch("device") == pytest.approx(one_process[0][0], abs=1e-6)


@pytest.mark.usefixtures("patched")
def test_rng_tracker() -> None:
    result = with_patch("rng_tracker")
    assert result["first"] != result["second"] and result["again"] == result["first"]
    assert not result["default_moved"] and not result["logged"]


@pytest.mark.usefixtures("patched")
def test_norm_sequence_parallel(one_process: list[tuple[float, float]]) -> None:
    for ours, theirs in zip(with_patch("norm_sequence_parallel"), one_process, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("name", needed("isend_alias"))
def test_a_send_keeps_its_memory(name: str) -> None:
    assert with_patch(name) == 1.0


@pytest.mark.usefixtures("patched")
def test_save_leaves_no_process_behind() -> None:
    result = with_patch("checkpoint_queue")
    assert result["left"] == 0 and result["files"] > 0


@pytest.mark.usefixtures("patched")
def test_experts_on_two_ranks_equal_one() -> None:
    assert with_patch("moe_split_sizes") == pytest.approx(with_patch("moe_router_gemm"), abs=1e-6)


@pytest.mark.usefixtures("patched")
def test_output_layer_is_built_without_apex() -> None:
    assert with_patch("output_layer_fusion") is False


def test_cuda_gets_only_what_is_wrong_there_too(without: dict[str, dict[str, Any]]) -> None:
    """Device code is left alone; saves and overlapped sends need their patches everywhere."""
    result = without["apply_cuda"]["value"]
    status = result["status"]
    assert not result["rewritten"]
    assert status["device"] == status["rng_tracker"] == "not needed: CPU only"
    everywhere = {
        "checkpoint_queue",
        "moe_router_gemm",
        "isend_alias",
        "output_layer_fusion",
    }
    everywhere -= set(FIXED)
    assert {name for name in status if status[name] == "applied"} == everywhere
