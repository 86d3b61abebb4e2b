"""An update of actor and critic gives the same loss, gradient norm and weights in every layout and batching.

Every layout runs clipped PPO and the critic; a sample of them runs every policy loss and aggregation, padded and
packed, by number and by budget, over ranks that do not divide the rows. Advantages are data here: the driver computes
them over the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import make_tiny_model

import megatron_patches
from rlhf3d.algorithms.aggregation import AGGREGATION_MODES
from rlhf3d.algorithms.kl import KL_KINDS
from rlhf3d.algorithms.losses import POLICY_LOSSES, PolicyLossSettings
from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import split_forward, split_update
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.derived import UpdatePlan, width_multiples
from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import LayoutConfig, OptimConfig, Recompute
from rlhf3d.engine.objectives import PolicyObjective, ValueObjective
from rlhf3d.parallel.layout import ParallelLayout

MAX_RESPONSE_TOKENS = 12
SEQUENCES = 16
BUCKET_ELEMENTS = 1
SETTINGS = PolicyLossSettings(0.2, 0.3, 3.0)
PPO = {
    "policy": PolicyObjective("vanilla", SETTINGS, "token-mean", 0.01, 0.1, "low_var_kl"),
    "value": ValueObjective(0.2, "seq-mean-token-mean"),
}


def every_algorithm() -> dict[str, PolicyObjective | ValueObjective]:
    """Each policy loss, each aggregation (of both models) and as many KL estimators, by name."""
    modes, kinds = cycle(AGGREGATION_MODES), cycle(KL_KINDS)
    chosen = [(loss, next(modes)) for loss in POLICY_LOSSES.names()]
    chosen += [("vanilla", mode) for mode in AGGREGATION_MODES if ("vanilla", mode) not in chosen]
    policies = [PolicyObjective(loss, SETTINGS, mode, 0.01, 0.1, next(kinds)) for loss, mode in chosen]
    objectives: dict[str, PolicyObjective | ValueObjective] = {
        f"{p.loss_name} {p.loss_agg_mode} {p.kl_loss_type}": p for p in policies
    }
    return objectives | {f"value {mode}": ValueObjective(0.2, mode) for mode in AGGREGATION_MODES[:2]}


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
    gather: bool = False
    """Overlap the gather of weights as well."""
    recompute: Recompute = "none"
    micro_batch_size: int = 2
    ep: int = 1
    model: str = "heads4"
    offload: bool = False
    cp: int = 1

    @property
    def layout(self) -> ParallelLayout:
        return parallel_layout(self.layout_config)

    @property
    def layout_config(self) -> LayoutConfig:
        return LayoutConfig(
            tp=self.tp, pp=self.pp, dp=self.dp, vpp=self.vpp, ep=self.ep, cp=self.cp, sequence_parallel=self.sp,
            distributed_optimizer=self.distributed_optimizer, overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.gather, recompute=self.recompute,
        )  # fmt: skip

    @property
    def fixed(self) -> MicroBatching:
        """Padded, by number."""
        return MicroBatching(self.micro_batch_size, **width_multiples(self.layout_config))

    def __str__(self) -> str:
        flags = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", f"mbs{self.micro_batch_size}"]
        flags += [f"vpp{self.vpp}"] if self.vpp else []
        flags += [f"{name}{n}" for name, n in (("ep", self.ep), ("cp", self.cp)) if n > 1]
        flags += [self.model] if self.model != "heads4" else []
        flags += [self.recompute] if self.recompute != "none" else []
        names = ("sp", "overlap", "gather", "offload")
        return "-".join(
            flags + [n for n in names if getattr(self, n)] + ([] if self.distributed_optimizer else ["ddp"])
        )


CASES = [
    Case(micro_batch_size=16),
    Case(tp=2),
    Case(tp=2, sp=True, micro_batch_size=1),
    Case(pp=2),
    Case(pp=2, micro_batch_size=4, recompute="full"),
    Case(dp=2, distributed_optimizer=False),
    Case(dp=4, overlap=True),
    Case(pp=4),
    Case(pp=2, vpp=2),
    Case(tp=2, pp=2, dp=1),
    Case(pp=2, dp=2, overlap=True, gather=True, offload=True),
    Case(tp=2, dp=2, sp=True),
    Case(tp=2, pp=2, dp=2),
    Case(tp=2, pp=2, dp=2, sp=True, micro_batch_size=1, recompute="selective"),
    Case(tp=2, pp=2, dp=2, vpp=2, sp=True, distributed_optimizer=False),
    Case(tp=3, pp=2, model="heads9"),
    Case(tp=1, pp=1, model="heads9"),
    Case(dp=2, ep=2, overlap=True, gather=True, model="experts"),
    Case(tp=2, sp=True, recompute="selective", model="experts"),
    Case(tp=2, dp=2, ep=2, sp=True, distributed_optimizer=False, model="experts", offload=True),
    Case(tp=2, pp=2, dp=2, ep=4, sp=True, micro_batch_size=1, recompute="full", model="experts"),
    Case(cp=2),
    Case(cp=4, micro_batch_size=1, recompute="full"),
    Case(tp=2, pp=2, cp=2, sp=True, overlap=True, gather=True),
    Case(cp=2, dp=2, pp=2, vpp=2, distributed_optimizer=False),
    Case(cp=2, dp=2, ep=4, model="experts"),
]


BATCHING_CASES = [
    Case(dp=3, overlap=True, gather=True, micro_batch_size=2, recompute="full", model="shallow"),
    Case(pp=2, dp=2, vpp=2, overlap=True, gather=True, micro_batch_size=3, model="shallow"),
    Case(tp=2, dp=2, ep=2, sp=True, micro_batch_size=3, model="experts"),
    Case(tp=2, pp=2, dp=2, sp=True, micro_batch_size=3, model="shallow"),
    Case(tp=2, dp=2, cp=2, sp=True, micro_batch_size=3, model="shallow"),
]


def batchings(case: Case) -> dict[str, MicroBatching]:
    """Fixed, by budget and packed; ranks need different numbers of micro-batches for their rows."""
    rules = {
        "fixed": case.fixed,
        "budget": replace(case.fixed, tokens=24),
        "packed": replace(case.fixed, tokens=40, packed=True),
    }
    return rules if case.tp > 1 else {**rules, "packed fixed": replace(case.fixed, packed=True)}


def make_batch() -> Batch:
    """Sequences of many lengths, with old values that make both clips bite, and sampling-correction weights."""
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
        rollout_is_weights=0.5 + torch.rand(shape, generator=generator),
    )


@dataclass(frozen=True)
class Update:
    """Two optimizer steps on fresh weights."""

    rule: MicroBatching
    objective: PolicyObjective | ValueObjective
    mini_batch: int = SEQUENCES // 2
    """Sequences; the second step has what is left."""


def run_updates(rank: int, port: int, case: Case, folder: Path, updates: dict[str, Update]) -> dict[str, dict]:
    """Each update on one rank; metrics, outputs and this rank's weights."""
    from rlhf3d.engine.megatron_engine import EngineContext
    from rlhf3d.models.spec import load_spec
    from rlhf3d.parallel.megatron_init import initialize_megatron
    from rlhf3d.parallel.platform import choose_platform

    torch.set_num_threads(1)
    platform = choose_platform("cpu")
    initialize_megatron(
        case.layout, rank, seed=0, platform=platform, master_addr="127.0.0.1", master_port=port, timeout_s=60
    )
    if case.gather:  # every weight in a bucket of its own; else all of a tiny model are whole when the first one is
        from megatron.core import distributed

        whole = distributed.DistributedDataParallelConfig
        distributed.DistributedDataParallelConfig = partial(whole, bucket_size=BUCKET_ELEMENTS)
    context = EngineContext(
        spec=load_spec(folder),
        layout=case.layout,
        layout_config=case.layout_config,
        rank=rank,
        platform=platform,
        dtype="float32",
        device=torch.device("cpu"),
        temperature=0.9,
        total_steps=10,
        offload=case.offload,
    )
    return {name: one_update(replace(context, packed=u.rule.packed), folder, u) for name, u in updates.items()}


def one_update(context, folder: Path, update: Update) -> dict:
    """Forward pass, two optimizer steps, forward pass."""
    from rlhf3d.engine.megatron_engine import MegatronEngine

    batch, layout, cost = make_batch(), context.layout, SequenceCost(0.02)
    dp = layout.coords(context.rank).dp
    sizes = {"mini_batch_size": update.mini_batch, "sequences_per_mini_batch": update.mini_batch}
    counts = {"mini_batches": 2, "optimizer_steps_per_step": 2, "sequences_per_rank": 0, "micro_batches_per_rank": None}
    plan = UpdatePlan(**sizes, **counts, micro_batching=update.rule, epochs=1)
    role = "value" if isinstance(update.objective, ValueObjective) else "policy"
    # A large epsilon keeps Adam from turning round-off in tiny gradients into whole steps.
    engine = MegatronEngine(context, role, str(folder), OptimConfig(lr=1e-3, eps=1e-3, clip_grad=1.0))
    forward = split_forward(batch, update.rule, layout, cost)[dp]
    share = split_update(batch, plan, layout, MAX_RESPONSE_TOKENS, cost)[dp]
    outputs = engine.forward(batch.select(forward.rows), forward.micro_batches)
    updated = engine.update(batch.select(share.rows), share.mini_batches, update.objective)
    with engine.residence.at_work("weights"):
        weights = [(name, box, tensor.clone()) for name, box, tensor in engine.export_pieces()]
    return {
        "rows": forward.rows,
        "outputs": outputs,
        "after": engine.forward(batch.select(forward.rows), forward.micro_batches),
        "shares": updated.shares,
        "grad_norm": updated.grad_norm,
        "weights": weights,
    }


def assemble(case: Case, results: list[dict], name: str) -> dict:
    """What the driver would see of an update: outputs by row, metrics summed, weights by HF name."""
    last = [results[rank][name] for rank in case.layout.collectors()]
    merged: dict = {"grad_norm": last[0]["grad_norm"], "outputs": {}, "after": {}, "weights": {}}
    for key in ("outputs", "after"):
        for part in last:
            for column, value in part[key].items():
                full = merged[key].setdefault(column, torch.zeros(SEQUENCES, value.shape[1]))
                full[part["rows"]] = value
    merged["metrics"] = {metric: sum(part["shares"][metric] for part in last) for metric in last[0]["shares"]}
    for result in results:
        for tensor_name, box, tensor in result[name]["weights"]:
            merged["weights"].setdefault(tensor_name, []).append((box, tensor))
    merged["weights"] = {tensor_name: full_tensor(pieces) for tensor_name, pieces in merged["weights"].items()}
    return merged


def compare(ours: dict, theirs: dict) -> tuple[float, float, float]:
    """Largest differences of metrics (relative above 1), gradient norm (relative) and weights; asserts their bounds."""
    assert ours["weights"].keys() == theirs["weights"].keys() and ours["metrics"].keys() == theirs["metrics"].keys()
    metric = max(abs(ours["metrics"][n] - x) / max(1.0, abs(x)) for n, x in theirs["metrics"].items())
    norm = abs(ours["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"]
    weight = max(float((ours["weights"][n] - x).abs().max()) for n, x in theirs["weights"].items())
    assert metric < 2e-6
    assert norm < 2e-6
    assert weight < 1e-5
    for key in ("outputs", "after"):
        for name, value in theirs[key].items():
            torch.testing.assert_close(ours[key][name], value, rtol=0, atol=2e-5)
    return metric, norm, weight


def full_tensor(pieces: list) -> torch.Tensor:
    """One HF tensor from its boxes; NaN where no rank wrote."""
    shape = [max(box[d][1] for box, _ in pieces) for d in range(len(pieces[0][0]))]
    full = torch.full(shape, float("nan"))
    for box, tensor in pieces:
        full[tuple(slice(a, b) for a, b in box)] = tensor
    return full


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Megatron imported once, before ranks are forked."""
    megatron_patches.apply("cpu")
    import rlhf3d.engine.megatron_engine
    import rlhf3d.parallel.megatron_init  # noqa: F401


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied models with 4 heads, one with SmolLM2's 9 heads and 3 KV heads, and a mixture of experts."""
    root = tmp_path_factory.mktemp("models")
    return {
        "heads4": make_tiny_model(root / "h4", heads=4, kv_heads=2, layers=8),
        "shallow": make_tiny_model(root / "shallow", heads=4, kv_heads=2, layers=4),
        "heads9": make_tiny_model(root / "h9", heads=9, kv_heads=3, hidden=72, ffn=96, vocab=120, layers=4),
        "experts": make_tiny_model(root / "moe", "qwen3_moe", tie=False, layers=2, vocab=115, norm_topk_prob=False),
    }


def one_process(folder: Path, objectives: dict, mini_batch: int) -> dict[str, dict]:
    """What one process computes with whole mini-batches at once, padded."""
    case = Case(micro_batch_size=SEQUENCES)
    updates = {name: Update(case.fixed, objective, mini_batch) for name, objective in objectives.items()}
    results = run_ranks(1, run_updates, case, folder, updates)
    return {name: assemble(case, results, name) for name in updates}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, dict]:
    """The update of PPO."""
    return {model: one_process(folders[model], PPO, SEQUENCES // 2) for model in {case.model for case in CASES}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_update_in_every_layout(case: Case, folders: dict[str, Path], references: dict[str, dict]) -> None:
    updates = {role: Update(case.fixed, objective) for role, objective in PPO.items()}
    results = run_ranks(case.layout.world_size, run_updates, case, folders[case.model], updates)
    for role in PPO:
        metric, norm, weight = compare(assemble(case, results, role), references[case.model][role])
        print(f"LAYOUT {case} {role}: metrics {metric:.1e} grad-norm {norm:.1e} weights {weight:.1e}")


def test_the_update_moves_the_weights(folders: dict[str, Path], references: dict[str, dict]) -> None:
    for role in PPO:
        before, after = references["heads4"][role]["outputs"], references["heads4"][role]["after"]
        assert all(float((before[name] - after[name]).abs().max()) > 1e-3 for name in before)


INCOMPLETE = 11  # sequences of the first mini-batch; the second has the 5 that are left


@pytest.fixture(scope="module")
def algorithm_references(folders: dict[str, Path]) -> dict[str, dict]:
    """The update of every algorithm, in mini-batches that nothing divides."""
    models = {case.model for case in BATCHING_CASES}
    return {model: one_process(folders[model], every_algorithm(), INCOMPLETE) for model in models}


@pytest.mark.parametrize("case", BATCHING_CASES, ids=str)
def test_same_update_in_every_batching(
    case: Case, folders: dict[str, Path], algorithm_references: dict[str, dict]
) -> None:
    objectives, theirs = every_algorithm(), algorithm_references[case.model]
    updates = {
        f"{batching}: {name}": Update(rule, objective, INCOMPLETE)
        for batching, rule in batchings(case).items()
        for name, objective in objectives.items()
    }
    results = run_ranks(case.layout.world_size, run_updates, case, folders[case.model], updates)
    for batching in batchings(case):
        worst = [compare(assemble(case, results, f"{batching}: {name}"), theirs[name]) for name in objectives]
        metric, norm, weight = (max(column) for column in zip(*worst, strict=True))
        print(f"BATCHING {case} {batching}: metrics {metric:.1e} grad-norm {norm:.1e} weights {weight:.1e}")


def test_algorithms_differ(algorithm_references: dict[str, dict]) -> None:
    """Else one of them would stand for all."""
    norms = [result["grad_norm"] for result in algorithm_references["shallow"].values()]
    assert len({f"{norm:.4g}" for norm in norms}) == len(norms)
