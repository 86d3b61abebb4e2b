"""PPO updates of actor and critic on real ranks, as one process would see them.

In any layout and batching.

Invariant: advantages are data: the driver computes them over the complete batch, so a layout can
change nothing in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.engines import CPU, join
from support.ranks import run_ranks
from support.rows import cut_rows
from torch import Tensor

from rlhf3d.algorithms.correction import importance_weights
from rlhf3d.algorithms.correction_settings import Bounds, CorrectionSettings
from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.algorithms.objectives import PolicyObjective, ValueObjective
from rlhf3d.algorithms.trajectories import join_rows, row_places
from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import for_update, split_forward, split_update
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.config.derived import width_multiples
from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import LayoutConfig, OptimConfig
from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.parallel.layout import ParallelLayout, Recompute
from rlhf3d.parallel.platform import Platform
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import token_versions

MAX_RESPONSE_TOKENS = 12
SEQUENCES = 16
TEMPERATURE = 0.9
BUCKET_ELEMENTS = 1
SETTINGS = PolicyLossSettings(0.2, 0.3, 3.0)
PPO = {
    "policy": PolicyObjective("vanilla", SETTINGS, "token-mean", 0.01, 0.1, "low_var_kl"),
    "value": ValueObjective(0.2, "seq-mean-token-mean"),
}


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
    dtype: str = "float32"
    platform: Platform = CPU

    @property
    def layout(self) -> ParallelLayout:
        return parallel_layout(self.layout_config)

    @property
    def layout_config(self) -> LayoutConfig:
        return LayoutConfig(
            tp=self.tp,
            pp=self.pp,
            dp=self.dp,
            vpp=self.vpp,
            ep=self.ep,
            cp=self.cp,
            sequence_parallel=self.sp,
            distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.gather,
            recompute=self.recompute,
        )

    @property
    def fixed(self) -> MicroBatching:
        """Padded, by number."""
        return MicroBatching(
            self.micro_batch_size, **width_multiples(self.layout_config, self.platform.kind)
        )

    def __str__(self) -> str:
        flags = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", f"mbs{self.micro_batch_size}"]
        flags += [f"vpp{self.vpp}"] if self.vpp else []
        flags += [f"{name}{n}" for name, n in (("ep", self.ep), ("cp", self.cp)) if n > 1]
        flags += [self.model] if self.model != "heads4" else []
        flags += [self.recompute] if self.recompute != "none" else []
        flags += [self.dtype] if self.dtype != "float32" else []
        names = ("sp", "overlap", "gather", "offload")
        return "-".join(
            flags
            + [n for n in names if getattr(self, n)]
            + ([] if self.distributed_optimizer else ["ddp"])
        )


FIRST_OF_GROUP = (0, 0, 0, 0, 4, 5, 5, 5, 8, 9, 9, 11, 11, 11, 14, 15)
"""Of each row, the row whose prompt it has."""


def make_batch() -> Batch:
    """Sequences of many lengths, with old values that make both clips bite.

    Sampling-correction weights. Prompts have up to four completions, two of which are equal, and a
    prompt begins as another one does.
    """
    generator = torch.Generator().manual_seed(1)

    def randint(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    prompts = [randint(4, 100, randint(1, 9)[0]) for _ in range(SEQUENCES)]
    prompts = [prompts[first] for first in FIRST_OF_GROUP]
    prompts[8] = [*prompts[5], *prompts[8]][:8]
    responses = [randint(4, 100, randint(1, MAX_RESPONSE_TOKENS + 1)[0]) for _ in range(SEQUENCES)]
    responses[2] = responses[1]
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


def make_turns(cut: bool) -> Batch:
    """`make_batch` with observations among the tokens, each trajectory one row or up to two.

    A second row's prompt is what stands before it, so that both have the same log-probs.
    """
    batch = make_batch()
    generator = torch.Generator().manual_seed(2)
    sampled = torch.rand(batch["response_mask"].shape, generator=generator) < 0.7
    batch = batch.with_columns(response_mask=batch["response_mask"] * sampled)
    if not cut:
        return batch
    middles = (batch["response_lengths"] // 2).tolist()
    # Every third stays a single row.
    return cut_rows(batch, [[middle] * (row % 3 > 0) for row, middle in enumerate(middles)])


def make_stale(proximal: Tensor | None = None) -> Batch:
    """`make_batch` as a step trains on it whose tokens versions 2 to 5 wrote, and 5 is trained.

    Versions differ between rows and within them, and the older one is, the further its log-probs
    are from version 5's, so that clips and truncation bite. `proximal` [N, R]: log-probs recomputed
    before the update, with importance weights for the older versions; without, the engine's are the
    old ones (bypass mode).
    """
    batch, generator = make_batch(), torch.Generator().manual_seed(3)
    trajectories = []
    for row in range(SEQUENCES):
        prompt, length = (int(batch[f"{part}_lengths"][row]) for part in ("prompt", "response"))
        ids = batch["input_ids"][row].tolist()
        oldest, middle = 2 + row % 3, length // 2
        versions = ((0, oldest), (middle, 5)) if middle and row % 2 else ((0, oldest),)
        ages = 5 - torch.tensor(token_versions(versions, length))
        noise = torch.randn(length, generator=generator)
        logprobs = (-4.8 + (0.1 + 0.4 * ages) * noise).tolist()
        span = Span("sampled", ids[prompt : prompt + length], logprobs, versions)
        asked = Prompt(tuple(ids[:prompt]), "test", "", {}, row, "")
        made = Trajectory(asked, row, (Row(asked.prompt_ids, (span,)),), "stop")
        trajectories.append(ScoredTrajectory(made, "", Score(1.0, Outcome.SCORED), 1.0))
    drawn = Experience(trajectories).batch(pad_id=0)
    assert torch.equal(drawn["input_ids"], batch["input_ids"])
    names = ("ref_logprobs", "advantages", "values", "returns")
    drawn = drawn.with_columns(**{name: batch[name] for name in names})
    if proximal is None:
        return drawn.with_columns(old_logprobs=drawn["rollout_logprobs"])
    settings = CorrectionSettings("token", Bounds(0.0, 2.0))
    weights, _ = importance_weights(
        proximal, drawn["rollout_logprobs"], drawn["response_mask"], settings
    )
    return drawn.with_columns(old_logprobs=proximal, rollout_is_weights=weights)


@dataclass(frozen=True)
class Update:
    """Two optimizer steps on fresh weights."""

    rule: MicroBatching
    objective: PolicyObjective | ValueObjective
    mini_batch: int = SEQUENCES // 2
    """Sequences; the second step has what is left."""
    make_batch: Callable[[], Batch] = make_batch
    recompute: bool = False
    """The old log-probs are those of the forward pass before, as after a phase old_logprobs."""
    after: bool = True
    """Whether a forward pass of the new weights follows: what is in them is compared anyway."""


def run_updates(
    rank: int, port: int, case: Case, folder: Path, updates: dict[Any, Update]
) -> dict[Any, dict]:
    """Each update on one rank; metrics, outputs and this rank's weights."""
    context = start(rank, port, case, folder)
    if case.gather:
        # Each weight in its own bucket: else a tiny model is complete when its first weight is.
        from megatron.core import distributed

        whole = distributed.DistributedDataParallelConfig
        distributed.DistributedDataParallelConfig = partial(whole, bucket_size=BUCKET_ELEMENTS)
    return {name: one_update(with_rule(context, u.rule), folder, u) for name, u in updates.items()}


def with_rule(context: Any, rule: MicroBatching) -> Any:
    """What engines share where micro-batches are cut by this rule."""
    return replace(context, packed=rule.packed, share_prefixes=rule.share_prefixes)


def start(rank: int, port: int, case: Case, folder: Path) -> Any:
    """Start one rank of a case; what its engines share."""
    return join(
        rank,
        port,
        folder,
        case.layout,
        case.layout_config,
        case.platform,
        dtype=case.dtype,
        temperature=TEMPERATURE,
        offload=case.offload,
    )


def one_update(context: Any, folder: Path, update: Update) -> dict:
    """Forward pass, two optimizer steps, and a forward pass where it is asked for.

    `fused` are the weights whose gradients products summed.
    """
    from rlhf3d.engine.megatron_engine import MegatronEngine

    batch = for_update(update.make_batch())
    layout, cost = context.layout, SequenceCost(0.02)
    dp = layout.coords(context.rank).dp
    plan = UpdatePlan(2, update.mini_batch, update.rule, None, epochs=1)
    role = "value" if isinstance(update.objective, ValueObjective) else "policy"
    # A large epsilon keeps Adam from turning round-off in tiny gradients into whole steps.
    engine = MegatronEngine(
        context, role, str(folder), OptimConfig(lr=1e-3, eps=1e-3, clip_grad=1.0)
    )
    forward = split_forward(batch, update.rule, layout, cost)[dp]
    whole = update.objective.whole_trajectories
    share = split_update(batch, plan, layout, MAX_RESPONSE_TOKENS, cost, whole)[dp]
    outputs = engine.forward(batch.select(forward.rows), forward.micro_batches)
    rows = batch.select(share.rows)
    if update.recompute and outputs is not None:
        # Cut alike, so what the loss reads on this rank was computed on it.
        assert forward.rows == share.rows
        rows = rows.with_columns(old_logprobs=outputs["logprobs"])
    updated = engine.update(rows, share.mini_batches, update.objective)
    with engine.states.on_device("weights"):
        weights = [
            (name, box, tensor.cpu().clone()) for name, box, tensor in engine.export_pieces()
        ]
    fused = [
        name
        for (_, name), param in engine.params().items()
        if getattr(param, "grad_added_to_main_grad", False)
    ]
    after = {}
    if update.after:
        after = engine.forward(batch.select(forward.rows), forward.micro_batches)
    return {
        "fused": fused,
        "rows": forward.rows,
        "own": None if updated.logprobs is None else (share.rows, updated.logprobs),
        "places": row_places(batch.columns),
        "outputs": outputs,
        "after": after,
        "shares": updated.shares,
        "grad_norm": updated.grad_norm,
        "weights": weights,
    }


def assemble(case: Case, results: list[dict], name: Any) -> dict:
    """What the driver would see of an update.

    Outputs by trajectory, metrics summed, weights by HF name; `own`: the log-probs of the update.
    """
    last = [results[rank][name] for rank in case.layout.collectors()]
    merged: dict = {"grad_norm": last[0]["grad_norm"], "outputs": {}, "after": {}}
    rows = sum(len(part["rows"]) for part in last)
    for key in ("outputs", "after"):
        for part in last:
            for column, value in part[key].items():
                full = merged[key].setdefault(column, torch.zeros(rows, value.shape[1]))
                full[part["rows"]] = value
        for column, full in merged[key].items():
            merged[key][column] = join_rows(full, last[0]["places"])
    if all(part["own"] is not None for part in last):
        batch = from_sequences([[0]] * rows, [[0] * value.shape[1]] * rows, pad_id=0)
        own = batch.in_row_order(*zip(*(part["own"] for part in last), strict=True))
        merged["own"] = join_rows(own, last[0]["places"])
    merged["metrics"] = {
        metric: sum(part["shares"][metric] for part in last) for metric in last[0]["shares"]
    }
    merged["weights"] = full_weights([result[name]["weights"] for result in results])
    return merged


def full_weights(exported: list[list]) -> dict[str, torch.Tensor]:
    """Whole tensors by HF name, from what the ranks export."""
    pieces: dict[str, list] = {}
    for name, box, tensor in (piece for of_rank in exported for piece in of_rank):
        pieces.setdefault(name, []).append((box, tensor))
    return {name: full_tensor(parts) for name, parts in pieces.items()}


def compare(
    ours: dict, theirs: dict, terms: int = 1, bound: float = 2e-6
) -> tuple[float, float, float]:
    """Largest differences of metrics (relative above 1), gradient norm (relative) and weights.

    Asserts their bounds.

    Metrics that are sums of `terms` numbers of about 1, which cancel, are rounded like their terms.
    `bound` is that of metrics and norm; weights may differ by 5 times, log-probs and values by 10
    times as much.
    """
    assert (
        ours["weights"].keys() == theirs["weights"].keys()
        and ours["metrics"].keys() == theirs["metrics"].keys()
    )
    errors = {name: abs(ours["metrics"][name] - x) for name, x in theirs["metrics"].items()}
    metric = max(errors[name] / max(terms, abs(x)) for name, x in theirs["metrics"].items())
    norm = abs(ours["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"]
    weight = max(float((ours["weights"][n] - x).abs().max()) for n, x in theirs["weights"].items())
    assert metric < bound
    assert norm < bound
    assert weight < 5 * bound
    for key in ("outputs", "after") if ours["after"] else ("outputs",):
        for name, value in theirs[key].items():
            torch.testing.assert_close(ours[key][name], value, rtol=0, atol=10 * bound)
    return metric, norm, weight


def full_tensor(pieces: list) -> torch.Tensor:
    """One HF tensor from its boxes; NaN where no rank wrote."""
    shape = [max(box[d][1] for box, _ in pieces) for d in range(len(pieces[0][0]))]
    full = torch.full(shape, float("nan"))
    for box, tensor in pieces:
        full[tuple(slice(a, b) for a, b in box)] = tensor
    return full


def one_process(
    folder: Path,
    objectives: dict,
    mini_batch: int,
    batches: Mapping[Any, Callable[[], Batch]] | None = None,
) -> dict[str, dict]:
    """What one process computes with whole mini-batches at once, padded.

    `batches`: of the objectives that have one of their own.
    """
    case = Case(micro_batch_size=SEQUENCES)
    updates = {}
    for name, objective in objectives.items():
        batch = (batches or {}).get(name, make_batch)
        updates[name] = Update(case.fixed, objective, mini_batch, batch)
    results = run_ranks(1, run_updates, case, folder, updates)
    return {name: assemble(case, results, name) for name in updates}
