"""A model saved and loaded between layouts trains on as if nothing had happened."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.ranks import RankError, run_ranks
from support.tiny_models import make_tiny_model

import megatron_patches
from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import split_update
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.derived import UpdatePlan
from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import LayoutConfig, OptimConfig
from rlhf3d.engine.objectives import PolicyObjective, ValueObjective
from rlhf3d.parallel.layout import ParallelLayout

STEPS_BEFORE, STEPS_AFTER = 2, 2
SEQUENCES, MAX_RESPONSE_TOKENS = 8, 6
OBJECTIVES = {
    "policy": PolicyObjective("vanilla", PolicyLossSettings(), "token-mean", 0.01),
    "value": ValueObjective(0.2, "token-mean"),
}


@dataclass(frozen=True)
class Case:
    """A layout and dtype to train in."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int | None = None
    ep: int = 1
    distributed_optimizer: bool = True
    dtype: str = "float32"
    cp: int = 1

    @property
    def settings(self) -> LayoutConfig:
        return LayoutConfig(
            tp=self.tp, pp=self.pp, dp=self.dp, vpp=self.vpp, ep=self.ep, cp=self.cp,
            distributed_optimizer=self.distributed_optimizer,
        )  # fmt: skip

    @property
    def layout(self) -> ParallelLayout:
        return parallel_layout(self.settings)

    def __str__(self) -> str:
        flags = f"-cp{self.cp}" * (self.cp > 1) + f"-ep{self.ep}" * (self.ep > 1) + f"-vpp{self.vpp}" * bool(self.vpp)
        flags += "-ddp" * (not self.distributed_optimizer) + "-bf16" * (self.dtype == "bfloat16")
        return f"tp{self.tp}pp{self.pp}dp{self.dp}{flags}"


def make_batch() -> Batch:
    """A batch whose advantages and returns are data."""
    rng = torch.Generator().manual_seed(1)
    lengths = (3, 5, 2, 6, 4, 1, 3, 5)
    responses = [torch.randint(4, 100, (n,), generator=rng).tolist() for n in lengths]
    batch = from_sequences([[7, 8]] * SEQUENCES, responses, pad_id=0)
    shape = batch["response_mask"].shape
    drawn = {name: torch.randn(shape, generator=rng) for name in ("advantages", "values", "returns")}
    return batch.with_columns(old_logprobs=torch.full(shape, -4.8), **drawn)


def train_and_save(
    rank: int, port: int, case: Case, model: Path, load: Path | None, save: Path | None, steps: int
) -> dict:
    """Build, load, train, save and go on; gradient norms, rates and weights of both models."""
    from rlhf3d.checkpoints import sharded
    from rlhf3d.engine.megatron_engine import EngineContext, MegatronEngine
    from rlhf3d.models.spec import load_spec
    from rlhf3d.parallel.megatron_init import initialize_megatron
    from rlhf3d.parallel.platform import choose_platform

    platform, layout = choose_platform("cpu"), case.layout
    initialize_megatron(
        layout, rank, seed=0, platform=platform, master_addr="127.0.0.1", master_port=port, timeout_s=60
    )
    context = EngineContext(
        spec=load_spec(model),
        layout=layout,
        layout_config=case.settings,
        rank=rank,
        platform=platform,
        dtype=case.dtype,
        device=torch.device("cpu"),
        temperature=1.0,
        total_steps=10,
    )
    plan = UpdatePlan(8, 1, 8, 8 // layout.dp, MicroBatching(rows=2), None, 1, 1)
    share = split_update(make_batch(), plan, layout, MAX_RESPONSE_TOKENS, float)[layout.coords(rank).dp]
    rows, result = make_batch().select(share.rows), {}
    optim = OptimConfig(lr=1e-2, eps=1e-3, lr_decay_style="linear", lr_warmup_steps=2)
    engines = {role: MegatronEngine(context, role, str(model), optim) for role in OBJECTIVES}
    for role, engine in engines.items():
        if load is not None:
            assert sharded.load(load / role, engine, optimizer=True) == same_world(load / role)
    pending = {}

    def update(role: str, count: int) -> list[tuple[float, float]]:
        found = [engines[role].update(rows, share.mini_batches, OBJECTIVES[role]) for _ in range(count)]
        return [(r.grad_norm, r.lr) for r in found]

    with ThreadPoolExecutor(1) as threads:
        for role in engines:
            update(role, 0 if load else steps)
        for role, engine in engines.items() if save else ():
            (save / role).mkdir(parents=True, exist_ok=True)
            torch.distributed.barrier()
            pending[role] = sharded.start_save(save / role, engine, True, threads)
        for role in engines:  # while it is being written
            result[role] = {"curve": update(role, STEPS_AFTER)}
        files = {
            f"{role}/{name}": info for role, p in pending.items() for name, info in sharded.finish_save(p, 60).items()
        }
    for role, engine in engines.items():
        result[role]["weights"] = [(name, box, tensor.clone()) for name, box, tensor in engine.export_pieces()]
        result[role]["files"] = files
    return result


def same_world(folder: Path) -> bool:
    """Whether the checkpoint is of as many ranks as this one's world."""
    return torch.load(folder / "common.pt", weights_only=False)["world_size"] == torch.distributed.get_world_size()


def assembled(results: list[dict], role: str) -> dict[str, torch.Tensor]:
    """Whole tensors by HF name."""
    whole: dict[str, torch.Tensor] = {}
    pieces = [piece for result in results for piece in result[role]["weights"]]
    for name, box, tensor in pieces:
        shape = [max(b[d][1] for n, b, _ in pieces if n == name) for d in range(len(box))]
        full = whole.setdefault(name, torch.full(shape, float("nan"), dtype=tensor.dtype))
        full[tuple(slice(a, b) for a, b in box)] = tensor
    return whole


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Megatron imported once, before ranks are forked."""
    megatron_patches.apply("cpu")
    import rlhf3d.checkpoints.sharded
    import rlhf3d.engine.megatron_engine
    import rlhf3d.parallel.megatron_init  # noqa: F401


BF16 = Case(pp=2, dp=2, dtype="bfloat16")
WITHOUT_SHARDING = Case(dp=2, distributed_optimizer=False)
ROUTES = {
    Case(2, 2, 2): [Case(2, 2, 2), Case(), Case(pp=2, dp=2)],
    WITHOUT_SHARDING: [WITHOUT_SHARDING, Case(tp=2, pp=2, vpp=2)],
    BF16: [BF16, Case(tp=2, dtype="bfloat16", distributed_optimizer=False)],
    Case(dp=2, ep=2): [Case(dp=2, ep=2), Case(dp=2)],
    Case(cp=2): [Case(cp=2), Case(tp=2)],
}


@pytest.mark.parametrize("source", ROUTES, ids=str)
def test_goes_on_in_every_layout(source: Case, tmp_path: Path) -> None:
    saved, experts = tmp_path / "saved", {"family": "qwen3_moe", "tie": False, "layers": 2}
    model = make_tiny_model(tmp_path / "model", **(experts if source.ep > 1 else {"layers": 4}))
    whole = run_ranks(source.layout.world_size, train_and_save, source, model, None, saved, STEPS_BEFORE)
    for target in ROUTES[source]:
        resumed = run_ranks(target.layout.world_size, train_and_save, target, model, saved, None, 0)
        for role in OBJECTIVES:
            ours, theirs = assembled(resumed, role), assembled(whole, role)
            assert ours.keys() == theirs.keys()
            worst = max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in theirs)
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


def test_a_full_disk_is_told_by_the_save(tmp_path: Path) -> None:
    """And does not hang: Python's files and torch's say it each in their own way."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.decode().strip()}")
    try:
        model = make_tiny_model(tmp_path / "model", layers=4)
        with pytest.raises(RankError, match=r"No space left on device|iostream error"):
            run_ranks(2, train_and_save, Case(dp=2), model, None, folder / "saved", 0)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
