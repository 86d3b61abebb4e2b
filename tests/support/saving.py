"""A model that trains, is saved while it trains on, or goes on from what was saved or converted.

Invariant: what is saved is the state before the updates that run beside the save.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from support.engines import join
from support.updates import MAX_RESPONSE_TOKENS, PPO, SEQUENCES, Case, make_batch, start

from rlhf3d.batching.dispatch import split_update
from rlhf3d.batching.micro import UpdatePlan
from rlhf3d.config.schema import LayoutConfig, OptimConfig
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform

STEPS_BEFORE, STEPS_AFTER = 2, 2


def train_and_save(
    rank: int,
    port: int,
    case: Case,
    model: Path,
    load: Path | None,
    save: Path | None,
    steps: int,
    wait: bool = False,
) -> dict:
    """Build, load, train, save and go on; gradient norms, rates and weights of both models."""
    from rlhf3d.checkpoints import sharded
    from rlhf3d.engine.megatron_engine import MegatronEngine

    context, layout, whole = start(rank, port, case, model), case.layout, make_batch()
    plan = UpdatePlan(1, SEQUENCES, case.fixed, None, 1)
    share = split_update(whole, plan, layout, MAX_RESPONSE_TOKENS, float)[layout.coords(rank).dp]
    rows, result = whole.select(share.rows), {}
    optim = OptimConfig(lr=1e-2, eps=1e-3, lr_decay_style="linear", lr_warmup_steps=2)
    engines = {role: MegatronEngine(context, role, str(model), optim) for role in PPO}
    for role, engine in engines.items():
        if load is not None:
            assert sharded.load(load / role, engine, optimizer=True) == same_world(load / role)
    pending = {}

    def update(role: str, count: int) -> list[tuple[float, float]]:
        found = [engines[role].update(rows, share.mini_batches, PPO[role]) for _ in range(count)]
        return [(r.grad_norm, r.lr) for r in found]

    with ThreadPoolExecutor(1) as threads:
        for role in engines:
            update(role, 0 if load else steps)
        for role, engine in engines.items() if save else ():
            (save / role).mkdir(parents=True, exist_ok=True)
            torch.distributed.barrier()
            pending[role] = sharded.start_save(save / role, engine, True, threads, wait)
        for role in engines:  # while it is being written
            result[role] = {"curve": update(role, STEPS_AFTER)}
        files = {
            f"{role}/{name}": info
            for role, p in pending.items()
            for name, info in sharded.finish_save(p, 60).items()
        }
    for role, engine in engines.items():
        result[role]["weights"] = [
            (name, box, tensor.clone()) for name, box, tensor in engine.export_pieces()
        ]
        result[role]["files"] = files
    return result


def same_world(folder: Path) -> bool:
    """Whether the checkpoint is of as many ranks as this one's world."""
    return (
        torch.load(folder / "common.pt", weights_only=False)["world_size"]
        == torch.distributed.get_world_size()
    )


def load_and_save(
    rank: int,
    port: int,
    platform: CPUPlatform,
    hf: Path,
    layout: ParallelLayout,
    role: Literal["policy", "value"],
    converted: Path,
    out: Path,
) -> int:
    """Load what was converted, compare it with the HF folder, save it with optimizer state."""
    from rlhf3d.checkpoints import sharded
    from rlhf3d.engine.megatron_engine import MegatronEngine

    layout_config = LayoutConfig(sequence_parallel=layout.tp > 1)
    context = join(rank, port, hf, layout, layout_config, platform)
    engine = MegatronEngine(context, role, str(hf), OptimConfig())
    expected = {name: param.detach().clone() for name, param in engine.params().items()}
    for param in engine.params().values():
        param.data.fill_(torch.nan)
    sharded.load(converted, engine, optimizer=False)
    for name, param in engine.params().items():
        assert torch.equal(param, expected[name]), f"{name} of rank {rank}"
    if rank == 0:
        out.mkdir()
    torch.distributed.barrier()
    with ThreadPoolExecutor(1) as threads:
        sharded.finish_save(
            sharded.start_save(out, engine, optimizer=True, threads=threads, wait=True),
            timeout_s=60,
        )
    return len(expected)
