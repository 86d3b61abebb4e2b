"""A PPO update of actor and critic gives the same loss, gradient norm and weights in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import make_tiny_model

from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import split_forward, split_update
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.derived import UpdatePlan
from rlhf3d.config.schema import LayoutConfig, OptimConfig
from rlhf3d.parallel.layout import ParallelLayout

MAX_RESPONSE_TOKENS = 12
SEQUENCES = 16


@dataclass(frozen=True)
class Case:
    """One way to cut the same update."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int | None = None
    sp: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    recompute: bool = False
    micro_batch_size: int = 2
    ep: int = 1
    model: str = "heads4"

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(self.tp, self.pp, self.dp, self.vpp or 1, self.ep)

    def __str__(self) -> str:
        flags = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", f"mbs{self.micro_batch_size}"]
        flags += [f"vpp{self.vpp}"] if self.vpp else []
        flags += [f"ep{self.ep}"] if self.ep > 1 else []
        flags += [self.model] if self.model != "heads4" else []
        names = ("sp", "overlap", "recompute")
        return "-".join(
            flags + [n for n in names if getattr(self, n)] + ([] if self.distributed_optimizer else ["ddp"])
        )


CASES = [
    Case(micro_batch_size=16),
    Case(tp=2),
    Case(tp=2, sp=True, micro_batch_size=1),
    Case(pp=2),
    Case(pp=2, micro_batch_size=4, recompute=True),
    Case(dp=2, distributed_optimizer=False),
    Case(dp=4, overlap=True),
    Case(pp=4),
    Case(pp=2, vpp=2),
    Case(tp=2, pp=2, dp=1),
    Case(pp=2, dp=2, overlap=True),
    Case(tp=2, dp=2, sp=True),
    Case(tp=2, pp=2, dp=2),
    Case(tp=2, pp=2, dp=2, sp=True, micro_batch_size=1),
    Case(tp=2, pp=2, dp=2, vpp=2, sp=True, distributed_optimizer=False),
    Case(tp=3, pp=2, model="heads9"),
    Case(tp=1, pp=1, model="heads9"),
    Case(dp=2, ep=2, model="experts"),
    Case(tp=2, sp=True, model="experts"),
    Case(tp=2, dp=2, ep=2, sp=True, distributed_optimizer=False, model="experts"),
    Case(tp=2, pp=2, dp=2, ep=4, sp=True, micro_batch_size=1, recompute=True, model="experts"),
]


def make_batch() -> Batch:
    """Sequences of many lengths, with old values that make both clips bite."""
    generator = torch.Generator().manual_seed(1)

    def randint(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    prompts = [randint(4, 100, randint(1, 9)[0]) for _ in range(SEQUENCES)]
    responses = [randint(4, 100, randint(1, MAX_RESPONSE_TOKENS + 1)[0]) for _ in range(SEQUENCES)]
    batch = from_sequences(prompts, responses, pad_id=0)
    shape = batch["response_mask"].shape
    draw = partial(torch.randn, shape, generator=generator)
    return batch.with_columns(
        old_logprobs=-4.8 + 0.5 * draw(),
        ref_logprobs=-4.8 + 0.5 * draw(),
        advantages=draw(),
        values=0.3 * draw(),
        returns=draw(),
    )


def ppo_update(rank: int, port: int, case: Case, folder: Path) -> dict:
    """Two optimizer steps of actor and critic on one rank; metrics, outputs and this rank's weights."""
    import megatron_patches

    megatron_patches.apply("cpu")
    from rlhf3d.engine.megatron_engine import EngineContext, MegatronEngine
    from rlhf3d.engine.objectives import PolicyObjective, ValueObjective
    from rlhf3d.models.spec import load_spec
    from rlhf3d.parallel.megatron_init import initialize_megatron
    from rlhf3d.parallel.platform import choose_platform

    torch.set_num_threads(1)
    layout = case.layout
    platform = choose_platform("cpu")
    initialize_megatron(
        layout, rank, seed=0, platform=platform, master_addr="127.0.0.1", master_port=port, timeout_s=60
    )
    context = EngineContext(
        spec=load_spec(folder),
        layout=layout,
        layout_config=LayoutConfig(
            case.tp,
            case.pp,
            case.dp,
            case.vpp,
            case.sp,
            case.distributed_optimizer,
            case.overlap,
            case.recompute,
        ),
        rank=rank,
        platform=platform,
        dtype="float32",
        device=torch.device("cpu"),
        temperature=0.9,
        total_steps=10,
    )
    batch, dp = make_batch(), layout.coords(rank).dp
    rule, cost = MicroBatching(case.micro_batch_size, multiple_of=case.tp if case.sp else 1), SequenceCost()
    plan = UpdatePlan(SEQUENCES // 2, 2, SEQUENCES // 2, SEQUENCES // 2 // case.dp, rule, None, 1, 2)
    objectives = {
        "policy": PolicyObjective("vanilla", PolicyLossSettings(0.2, 0.3, 3.0), "token-mean", 0.01, 0.1, "low_var_kl"),
        "value": ValueObjective(0.2, "seq-mean-token-mean"),
    }
    result: dict = {}
    for role, objective in objectives.items():
        # A large epsilon keeps Adam from turning round-off in tiny gradients into whole steps.
        engine = MegatronEngine(context, role, str(folder), OptimConfig(lr=1e-3, eps=1e-3, clip_grad=1.0))
        forward = split_forward(batch, rule, layout, cost)[dp]
        update = split_update(batch, plan, layout, MAX_RESPONSE_TOKENS, cost)[dp]
        outputs = engine.forward(batch.select(forward.rows), forward.micro_batches)
        updated = engine.update(batch.select(update.rows), update.mini_batches, objective)
        after = engine.forward(batch.select(forward.rows), forward.micro_batches)
        result[role] = {
            "rows": forward.rows,
            "outputs": outputs,
            "after": after,
            "shares": updated.shares,
            "grad_norm": updated.grad_norm,
            "weights": [(name, box, tensor.clone()) for name, box, tensor in engine.export_pieces()],
        }
    return result


def assemble(case: Case, results: list[dict], role: str) -> dict:
    """What the driver would see: outputs by row, metrics summed, weights by HF name."""
    last = [results[rank][role] for rank in case.layout.collectors()]
    merged: dict = {"grad_norm": last[0]["grad_norm"], "outputs": {}, "after": {}, "weights": {}}
    for key in ("outputs", "after"):
        for part in last:
            for name, value in part[key].items():
                full = merged[key].setdefault(name, torch.zeros(SEQUENCES, value.shape[1]))
                full[part["rows"]] = value
    merged["metrics"] = {name: sum(part["shares"][name] for part in last) for name in last[0]["shares"]}
    for result in results:
        for name, box, tensor in result[role]["weights"]:
            merged["weights"].setdefault(name, []).append((box, tensor))
    return merged


def full_tensor(pieces: list) -> torch.Tensor:
    """One HF tensor from its boxes; NaN where no rank wrote."""
    shape = [max(box[d][1] for box, _ in pieces) for d in range(len(pieces[0][0]))]
    full = torch.full(shape, float("nan"))
    for box, tensor in pieces:
        full[tuple(slice(a, b) for a, b in box)] = tensor
    return full


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied model with 4 heads, one with SmolLM2's 9 heads and 3 KV heads, and a mixture of experts."""
    root = tmp_path_factory.mktemp("models")
    return {
        "heads4": make_tiny_model(root / "h4", heads=4, kv_heads=2, layers=8),
        "heads9": make_tiny_model(root / "h9", heads=9, kv_heads=3, hidden=72, ffn=96, vocab=120, layers=4),
        "experts": make_tiny_model(root / "moe", "qwen3_moe", tie=False, layers=2, vocab=115, norm_topk_prob=False),
    }


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, dict]:
    """One process, whole mini-batches at once."""
    case = Case(micro_batch_size=SEQUENCES // 2)
    return {
        model: {role: assemble(case, results, role) for role in ("policy", "value")}
        for model, folder in folders.items()
        for results in [run_ranks(1, ppo_update, case, folder)]
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_update_in_every_layout(case: Case, folders: dict[str, Path], references: dict[str, dict]) -> None:
    results = run_ranks(case.layout.world_size, ppo_update, case, folders[case.model])
    for role in ("policy", "value"):
        ours, theirs = assemble(case, results, role), references[case.model][role]
        worst_loss = max(abs(ours["metrics"][n] - theirs["metrics"][n]) for n in theirs["metrics"])
        worst_norm = abs(ours["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"]
        assert ours["weights"].keys() == theirs["weights"].keys()
        worst_weight = max(
            float((full_tensor(ours["weights"][n]) - full_tensor(theirs["weights"][n])).abs().max())
            for n in theirs["weights"]
        )
        print(f"LAYOUT {case} {role}: metrics {worst_loss:.1e} grad-norm {worst_norm:.1e} weights {worst_weight:.1e}")
        assert worst_loss < 2e-6
        assert worst_norm < 2e-6
        assert worst_weight < 1e-5
        for key in ("outputs", "after"):
            for name, value in theirs[key].items():
                torch.testing.assert_close(ours[key][name], value, rtol=0, atol=2e-5)


def test_the_update_moves_the_weights(folders: dict[str, Path], references: dict[str, dict]) -> None:
    for role in ("policy", "value"):
        before, after = references["heads4"][role]["outputs"], references["heads4"][role]["after"]
        assert all(float((before[name] - after[name]).abs().max()) > 1e-3 for name in before)
