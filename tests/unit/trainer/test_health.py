"""What a run says about numbers that look wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.experience import in_groups

from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.trainer.health import HealthMonitor


def test_equal_rewards_are_reported_and_counted() -> None:
    said: list[str] = []
    monitor = HealthMonitor(said.append, "stop", 5.0)
    monitor.check_rewards(1, in_groups([0, 0, 1, 1], 2))
    monitor.check_rewards(2, in_groups([0, 0, 1, 1], 2))
    assert "step 2:" in said[1] and "each of the 2 groups" in said[1]
    assert "equal rewards (between 0 and 1)" in said[1] and "2 such steps" in said[1]
    monitor.check_rewards(3, in_groups([0, 1, 1, 1], 2))
    monitor.check_rewards(4, in_groups([0, 1], 1))
    assert len(said) == 2
    monitor.check_rewards(5, in_groups([3, 3], 1))
    assert "all 2 completions have equal rewards" in said[2] and "1 such step in" in said[2]
    monitor.check_rewards(6, in_groups([3], 1))
    assert len(said) == 3, "one completion alone has a value to be compared with, or nothing"


def batch(**columns: torch.Tensor) -> Batch:
    return from_sequences([[1]] * 2, [[5, 6], [7]], 0).with_columns(**columns)


def test_broken_numbers_stop_or_are_said() -> None:
    good = batch(old_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, math.nan]]))  # the NaN is padding
    bad = batch(
        old_logprobs=torch.tensor([[-1.0, -2.0], [-math.inf, 0.0]]),
        values=torch.full((2, 2), math.nan),
    )
    said: list[str] = []
    monitor = HealthMonitor(said.append, "skip", 5.0)
    monitor.check_batch(3, good)
    monitor.check_batch(3, bad)
    assert len(said) == 1 and "sequence 0 (values); sequence 1 (old_logprobs, values)" in said[0]
    with pytest.raises(
        RuntimeError,
        match=r"numbers of 2 of 2 sequences are not finite.*step_3\.jsonl.*on_nonfinite",
    ):
        HealthMonitor(said.append, "stop", 5.0).check_batch(3, bad)


def test_rows_of_a_trajectory_are_one_sequence() -> None:
    """Named by its line in samples/, once."""
    rows = from_sequences([[1]] * 3, [[5], [6], [7]], 0)
    bad = rows.with_columns(
        sequence=torch.tensor([0, 1, 1]),
        values=torch.tensor([[0.0], [math.nan], [0.0]]),
        returns=torch.tensor([[0.0], [0.0], [math.inf]]),
    )
    with pytest.raises(
        RuntimeError, match=r"of 1 of 2 sequences .*: sequence 1 \(values, returns\)\. Seq"
    ):
        HealthMonitor(print, "stop", 5.0).check_batch(3, bad)


def test_spikes_and_skipped_steps_are_said() -> None:
    said: list[str] = []
    monitor = HealthMonitor(said.append, "skip", 5.0)
    for step in range(5):
        assert math.isnan(
            monitor.check_update(step, {"actor/grad_norm": 2.0})["actor/grad_norm_ratio"]
        )
    assert (
        monitor.check_update(6, {"actor/grad_norm": 8.0}) == {"actor/grad_norm_ratio": 4.0}
        and said == []
    )
    again = HealthMonitor(said.append, "skip", 5.0)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    found = again.check_update(
        7, {"actor/grad_norm": 12.0, "actor/skipped_steps": 0.0, "critic/skipped_steps": 2.0}
    )
    assert found == {"actor/grad_norm_ratio": 6.0}
    assert "gradient norm of the actor 12, 6.0 times" in said[0]
    assert "2 optimizer steps of the critic left out" in said[1]
