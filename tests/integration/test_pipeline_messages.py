"""Pipeline stages work out the shapes of their messages instead of sending them.

They get what upstream's stages get.

Nor do they wait for the device in between.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import make_tiny_model
from support.updates import PPO, Case, Update, run_updates

pytestmark = pytest.mark.usefixtures("megatron")
CASES = {
    str(case) + " packed" * packed: (case, packed)
    for case, packed in (
        (Case(pp=2, dp=2, micro_batch_size=3), False),
        (Case(pp=2, vpp=2, micro_batch_size=3), True),
        (Case(pp=4, vpp=2, micro_batch_size=1), False),
        (Case(tp=2, pp=2, sp=True), True),
    )
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight layers."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "h4", heads=4, kv_heads=2, layers=8)


def update(
    rank: int, port: int, case: Case, folder: Path, updates: dict[str, Update], planned: bool
) -> tuple[dict[str, dict], int, int]:
    """The updates, and how many shapes this rank passed on and waits for the device it made."""
    from megatron_patches import cpu_cuda
    from rlhf3d.parallel import pipeline

    if not planned:
        pipeline.schedule_arguments = lambda config, shapes: {}
    shapes = waits = 0
    operation = torch.distributed.P2POp

    def count(function, tensor, *place):  # type: ignore[no-untyped-def]
        nonlocal shapes
        shapes += tensor.dtype == torch.int64
        return operation(function, tensor, *place)

    def wait(device: object = None) -> None:
        nonlocal waits
        waits += 1

    torch.distributed.P2POp, cpu_cuda.synchronize = count, wait
    return run_updates(rank, port, case, folder, updates), shapes, waits


GPU_SET = list(CASES)[:2]
"""With the GPU set's Megatron in `make test`: both schedules, padded and packed."""
CHOSEN = [
    pytest.param(name, marks=pytest.mark.gpu_set if name in GPU_SET else pytest.mark.gpu_set_full)
    for name in CASES
]


@pytest.mark.parametrize("name", CHOSEN)
def test_stages_need_not_tell_each_other_a_shape(name: str, folder: Path) -> None:
    case, packed = CASES[name]
    updates = {
        role: Update(replace(case.fixed, packed=packed), objective)
        for role, objective in PPO.items()
    }
    size = case.layout.world_size
    ours = run_ranks(size, update, case, folder, updates, True)
    theirs = run_ranks(size, update, case, folder, updates, False)
    assert all(shapes > 0 and waits > 0 for _, shapes, waits in theirs)
    assert [counts for _, *counts in ours] == [[0, 0]] * size
    for (mine, *_), (other, *_) in zip(ours, theirs, strict=True):
        for role in PPO:
            assert mine[role]["grad_norm"] == other[role]["grad_norm"]
            assert mine[role]["shares"] == other[role]["shares"]
            weights = zip(mine[role]["weights"], other[role]["weights"], strict=True)
            assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in weights)
