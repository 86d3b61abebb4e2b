"""A model saved and loaded between layouts trains on as if nothing had happened."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankError, run_ranks
from support.saving import STEPS_BEFORE, train_and_save
from support.tiny_models import make_tiny_model
from support.updates import PPO, Case, full_weights

from rlhf3d.checkpoints.manifest import infos_below

pytestmark = pytest.mark.usefixtures("megatron")


BF16 = Case(pp=2, dp=2, dtype="bfloat16")
WITHOUT_SHARDING = Case(dp=2, distributed_optimizer=False)
ROUTES = {
    Case(2, 2, 2): [Case(2, 2, 2), Case(), Case(pp=2, dp=2)],
    WITHOUT_SHARDING: [WITHOUT_SHARDING, Case(tp=2, pp=2, vpp=2)],
    BF16: [BF16, Case(tp=2, dtype="bfloat16", distributed_optimizer=False)],
    Case(dp=2, ep=2): [Case(dp=2, ep=2), Case(dp=2)],
    Case(cp=2): [Case(cp=2), Case(tp=2)],
}


GPU_SET = [Case(2, 2, 2), BF16, Case(dp=2, ep=2)]
"""Those that `make test` runs with the GPU set's Megatron too: each kind of optimizer state."""


def sources() -> list[Any]:
    """What is saved, for both versions of Megatron or for the GPU set's in the full run only."""
    made = []
    for case in ROUTES:
        mark = pytest.mark.gpu_set if case in GPU_SET else pytest.mark.gpu_set_full
        made.append(pytest.param(case, marks=mark, id=str(case)))
    return made


@pytest.mark.parametrize("source", sources())
def test_goes_on_in_every_layout(source: Case, tmp_path: Path) -> None:
    saved, experts = tmp_path / "saved", {"family": "qwen3_moe", "tie": False, "layers": 2}
    model = make_tiny_model(tmp_path / "model", **(experts if source.ep > 1 else {"layers": 4}))
    whole = run_ranks(
        source.layout.world_size, train_and_save, source, model, None, saved, STEPS_BEFORE
    )
    for target in ROUTES[source]:
        resumed = run_ranks(target.layout.world_size, train_and_save, target, model, saved, None, 0)
        for role in PPO:
            ours, theirs = (
                full_weights([r[role]["weights"] for r in found]) for found in (resumed, whole)
            )
            assert ours.keys() == theirs.keys()
            worst = max(
                float((ours[name].float() - theirs[name].float()).abs().max()) for name in theirs
            )
            curves = [results[0][role]["curve"] for results in (resumed, whole)]
            norm = max(abs(a[0] - b[0]) / b[0] for a, b in zip(*curves, strict=True))
            print(f"RESUME {source} -> {target} {role}: weights {worst:.1e} grad-norm {norm:.1e}")
            assert [lr for _, lr in curves[0]] == [lr for _, lr in curves[1]]
            if target == source:
                assert worst == 0 and norm == 0
            elif source.dtype == "float32":
                assert worst < 1e-5 and norm < 2e-6
            else:
                assert worst < 2e-2 and norm < 2e-2


@pytest.mark.gpu_set_full
def test_a_save_that_is_waited_for_writes_the_same(tmp_path: Path) -> None:
    """Without a copy of what it writes, and while the model trains on as soon as it returns."""
    model, case = make_tiny_model(tmp_path / "model", layers=4), Case(2, 2, 2)
    written = []
    for wait in (False, True):
        folder = tmp_path / str(wait)
        ranks = run_ranks(8, train_and_save, case, model, None, folder, STEPS_BEFORE, wait)
        reported = {name: info for rank in ranks for name, info in rank["policy"]["files"].items()}
        assert reported == infos_below(folder)
        written.append(reported)
    assert written[0].keys() == written[1].keys()
    # torch gives each index a random number.
    for name, info in written[0].items():
        assert name.endswith(".metadata") or written[1][name] == info, name


@pytest.mark.gpu_set_full
def test_a_full_disk_is_told_by_the_save(tmp_path: Path) -> None:
    """And does not hang: Python's files and torch's say it each in their own way."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.decode().strip()}")
    try:
        model = make_tiny_model(tmp_path / "model", layers=4)
        with pytest.raises(RankError, match=r"No space left on device|iostream error"):
            run_ranks(2, train_and_save, Case(dp=2), model, None, folder / "saved", 0)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
