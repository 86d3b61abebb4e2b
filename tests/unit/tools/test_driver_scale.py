"""What goes through the driver grows with the rows of a step, and with ranks only by the call."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.algorithms.objectives import PolicyObjective
from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.placement import train_group, waiting
from rlhf3d.placement.engine_rank import EngineRank
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.worker import TrainWorker

BENCH = Path(__file__).parents[3] / "tools" / "bench"
TOKENS_OF_ROW = (7, 3, 40, 12)
RULE = MicroBatching(rows=4, tokens=256, packed=True)


@pytest.fixture
def bench() -> Iterator[tuple[Any, Any]]:
    """The modules of the tool."""
    with mock.patch.object(sys, "path", [str(BENCH), *sys.path]):
        import pretended_ray
        import pretended_run

        yield pretended_ray, pretended_run


def step_of(bench: tuple[Any, Any], layout: ParallelLayout, rows: int) -> dict[str, int]:
    """Two passes and an update of pretended ranks; what was counted."""
    pretended_ray, pretended_run = bench
    meter = pretended_ray.Meter()
    ray = pretended_ray.PretendedRay(meter, {TrainWorker: pretended_run.TrainRank}, wave=64)
    group = TrainGroup.__new__(TrainGroup)
    group.name, group.layout, group.timeout_s = "actor", layout, 60.0
    group.micro_batching, group.cost = {"actor": RULE}, SequenceCost()
    group.max_response_tokens, group.meanwhile, group._padding = 64, None, {}
    setup = mock.Mock(group=mock.Mock(layout=layout))
    with (
        mock.patch.object(train_group, "ray", ray),
        mock.patch.object(waiting, "ray", ray),
    ):
        group.workers = [
            ray.remote(TrainWorker).remote(setup, rank) for rank in range(layout.world_size)
        ]
        run_phases(group, batch_of(rows))
    return dict(meter.counts)


def batch_of(rows: int) -> Batch:
    """Rows of unequal length, one of which is long."""
    lengths = [TOKENS_OF_ROW[row % len(TOKENS_OF_ROW)] for row in range(rows)]
    batch = from_sequences([[1, 2]] * rows, [[3] * length for length in lengths], pad_id=0)
    return batch.with_columns(
        advantages=batch["response_mask"].clone(), rollout_logprobs=-batch["response_mask"]
    )


def run_phases(group: TrainGroup, batch: Batch) -> None:
    """Each row's log-probs come back to it."""
    plan = UpdatePlan(1, len(batch), RULE, None, 1)
    objective = PolicyObjective("vanilla", PolicyLossSettings(), "token-mean", old_is_current=True)
    for phase in ("old_logprobs", "ref_logprobs"):
        logprobs = group.forward(phase, "actor", batch)["logprobs"]
        assert set(group.forward(phase, "actor", batch)) == {"logprobs"}
    _, updated = group.update("actor", batch, plan, objective)
    wanted = -batch["response_mask"] * (batch["response_lengths"] / 4096)[:, None]
    assert torch.equal(logprobs, wanted) and updated is not None and torch.equal(updated, wanted)


def test_pretended_ranks_are_called_as_the_real_ones(bench: tuple[Any, Any]) -> None:
    _, pretended_run = bench
    pretended = {pretended_run.TrainRank: TrainWorker, pretended_run.EnginePretended: EngineRank}
    for stand_in, real in pretended.items():
        for name, method in inspect.getmembers(stand_in, inspect.isfunction):
            if not name.startswith("_"):
                wanted = list(inspect.signature(getattr(real, name)).parameters)
                assert list(inspect.signature(method).parameters) == wanted, name


def test_bytes_do_not_grow_with_ranks(bench: tuple[Any, Any]) -> None:
    """64 and 512 ranks with as many replicas: calls are more, the batch goes out and in once."""
    few = step_of(bench, ParallelLayout(tp=2, pp=4, dp=8), 64)
    many = step_of(bench, ParallelLayout(tp=8, pp=8, dp=8), 64)
    assert many["bytes put"] == few["bytes put"]
    assert many["calls"] == 8 * few["calls"] == 5 * 512
    # The answer of a rank that nobody asks, and a call, are a few bytes each.
    assert many["bytes got"] - few["bytes got"] < 64 * 5 * (512 - 64)
    assert many["bytes in calls"] < 512 * 5 * 512
    assert many["refs waited for"] <= 5 * 2 * 512 * (512 // 64)


def test_bytes_grow_with_tokens_and_not_with_the_longest_row(bench: tuple[Any, Any]) -> None:
    layout = ParallelLayout(tp=2, pp=4, dp=8)
    half, whole = step_of(bench, layout, 256), step_of(bench, layout, 512)
    for name in ("bytes put", "bytes got"):
        assert whole[name] < 2.05 * half[name], name
    assert whole["calls"] == half["calls"]
    # Of a response token: id, mask and two columns twice over, four columns back; see `packed.py`.
    tokens = sum(TOKENS_OF_ROW) * 128
    grown_put, grown_got = (whole[name] - half[name] for name in ("bytes put", "bytes got"))
    assert grown_got < 5 * 4 * tokens / 2 + 4096
    assert grown_put < (4 * 5 + 13) * (tokens + 2 * 512) / 2 + 40 * 5 * 256
    padded = len(pickle.dumps(batch_of(512).columns["input_ids"].numpy()))
    assert whole["bytes put"] < 5 * padded
