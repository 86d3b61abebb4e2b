"""Whole batches in, whole batches out: rows come back in their own order, and padding is counted
phase by phase.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.algorithms.objectives import PolicyObjective, ValueObjective
from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.batching.packed import pack_columns
from rlhf3d.config.groups import worker_groups
from rlhf3d.config.schema import Config, RolloutConfig
from rlhf3d.engine.microbatch import UpdateResult
from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.placement.train_group import TrainGroup, sequence_cost
from rlhf3d.placement.worker import TrainWorker, worker_setup

RULE = MicroBatching(4)
OBJECTIVE = ValueObjective(0.2, "token-mean")
SPEC = ModelSpec(
    "llama",
    num_layers=3,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=5,
    ffn_size=16,
    vocab_size=9,
)


class DryGroup(TrainGroup):
    """Ranks that answer with what they were sent: each row's length as its log-probs."""

    def __init__(self) -> None:
        self.layout, self.cost, self.max_response_tokens = ParallelLayout(dp=2), SequenceCost(), 9
        self.micro_batching = {"actor": RULE, "critic": MicroBatching(1)}
        self._padding = {}
        self.updates: list[tuple[Any, ...]] = []
        """What each replica was sent for the last update."""

    def _dispatch(
        self, phase: str, method: Any, args_of_dp: Iterable[tuple[Any, ...]]
    ) -> list[Any]:
        # Of a forward pass the phase comes first.
        sent = [args[1:] if method is TrainWorker.forward else args for args in args_of_dp]
        shards: list[Batch] = [rows.unpack() for _, rows, *_ in sent]
        own = [b["response_lengths"][:, None] * torch.ones_like(b["response_mask"]) for b in shards]
        answers = [
            pack_columns({"logprobs": column}, shard["response_lengths"])
            for column, shard in zip(own, shards, strict=True)
        ]
        if method is TrainWorker.forward:
            return answers
        assert method is TrainWorker.update
        self.updates = [
            (role, shard, *rest) for (role, _, *rest), shard in zip(sent, shards, strict=True)
        ]
        objective = sent[0][-1]
        results = []
        for dp, answer in enumerate(answers):
            logprobs = answer["logprobs"] if objective.old_is_current else None
            results.append((UpdateResult({"actor/loss": 1.0 + dp}, 5.0, 0.1), logprobs))
        return results


def test_rows_keep_their_order_and_padding_is_told_once() -> None:
    lengths = [5, 1, 3, 2, 9, 7, 4]
    batch = from_sequences([[1]] * 7, [[2] * n for n in lengths], pad_id=0)
    group = DryGroup()
    # Dealt 9 | 7, 4 | 5, 2 | 3 and 1 to the lighter: 10 5 3 2 with prompts, and 8 6 4.
    for phase, measured in (("old_logprobs", True), ("canary", False)):
        outputs = group.forward(phase, "actor", batch, measure_padding=measured)
        assert outputs["logprobs"][:, 0].tolist() == lengths
    assert group.forward("values", "critic", batch)["logprobs"][:, 0].tolist() == lengths
    plan = UpdatePlan(1, 7, RULE, None, 2)
    metrics, logprobs = group.update("actor", batch, plan, OBJECTIVE)
    assert logprobs is None
    assert {objective for _, _, _, objective in group.updates} == {OBJECTIVE}
    assert "trajectory_tokens" not in group.updates[0][1]
    assert metrics["actor/loss"] == 3.0 and metrics["actor/grad_norm"] == 5.0
    padding = {name: value for name, value in metrics.items() if "padding" in name}
    tokens = sum(lengths) + 7
    assert padding == {
        "perf/padding_share/old_logprobs": pytest.approx(1 - tokens / (4 * 10 + 3 * 8)),
        "perf/padding_share/values": pytest.approx(
            1 - tokens / (tokens + 1)
        ),  # 4 and 3 rows, and a filler
        "perf/padding_share/update_actor": pytest.approx(1 - tokens / (4 * 10 + 3 * 8)),
    }
    assert metrics["perf/shared_prefix_share/update_actor"] == 0.0
    again, _ = group.update("actor", batch, plan, OBJECTIVE)
    assert [name for name in again if "padding" in name] == ["perf/padding_share/update_actor"]


@pytest.mark.parametrize("loss", ["vanilla", "gspo"])
def test_log_probs_of_an_update_come_back_in_the_order_of_rows(loss: str) -> None:
    """Also where trajectories of several rows are computed together."""
    lengths = [5, 1, 3, 2, 9, 7, 4]
    batch = from_sequences([[1]] * 7, [[2] * n for n in lengths], pad_id=0)
    batch = batch.with_columns(trajectory_ids=torch.tensor([0, 0, 1, 2, 2, 3, 4]))
    settings = PolicyLossSettings()
    objective = PolicyObjective(loss, settings, "token-mean", old_is_current=True)
    plan = UpdatePlan(1, 5, RULE, None, 1)
    metrics, logprobs = DryGroup().update("actor", batch, plan, objective)
    assert logprobs is not None and logprobs[:, 0].tolist() == lengths
    assert logprobs.shape == batch["response_mask"].shape and metrics["actor/loss"] == 3.0


@pytest.mark.parametrize("loss", ["vanilla", "gspo"])
def test_ranks_get_what_losses_need_of_trajectories_of_several_rows(loss: str) -> None:
    """Their tokens always, and all rows of each in one micro-batch for a ratio of sequences."""
    owners = [0, 0, 1, 2, 2]
    batch = from_sequences([[1]] * 5, [[2] * n for n in (9, 1, 8, 5, 6)], pad_id=0)
    batch = batch.with_columns(trajectory_ids=torch.tensor(owners))
    group, plan = DryGroup(), UpdatePlan(1, 3, MicroBatching(2), None, 1)
    objective = PolicyObjective(loss, PolicyLossSettings(), "seq-mean-token-mean")
    group.update("actor", batch, plan, objective)
    cut, sent = [], []
    for _, shard, minis, _ in group.updates:
        assert minis[0].norm.sequences == 3
        sent += torch.stack([shard["trajectory_ids"], shard["trajectory_tokens"]], 1).tolist()
        for rows in minis[0].micro_batches:
            cut.append(shard["trajectory_ids"][rows].tolist())
    assert sorted(sent) == [[0, 10], [0, 10], [1, 8], [2, 11], [2, 11]]
    whole = [0, 0] in cut and [2, 2] in cut
    assert whole == (loss == "gspo")


@pytest.mark.parametrize("sleep", [False, True])
def test_models_are_told_whether_engines_want_their_device_between_work(
    sleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rlhf3d.engine.megatron_engine.MegatronEngine", lambda context, *args: context
    )
    monkeypatch.setattr("rlhf3d.models.spec.load_spec", lambda folder: None)
    config = replace(Config(), rollout=RolloutConfig(sleep=sleep))
    worker = TrainWorker.__new__(TrainWorker)
    worker.setup = worker_setup(config, worker_groups(config)[0], CPUPlatform("test"), 1)
    worker.rank, worker.engines = 0, {}
    worker._load_models()
    assert worker.engines["actor"].shared is sleep  # type: ignore[attr-defined]


def test_cost_by_hand() -> None:
    # weights of a layer: 8·5·(4 query + 4 output + 2 key + 2 value heads) + 3·8·16 = 480 + 384
    assert sequence_cost(SPEC)(10) == pytest.approx(10 + 4 * 5 / 864 * 100)
    experts = replace(SPEC, num_experts=8, experts_per_token=2, moe_ffn_size=4, ffn_size=0)
    assert sequence_cost(experts)(10) == pytest.approx(10 + 4 * 5 / (480 + 2 * 3 * 8 * 4) * 100)
