"""Mismatch and critic metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf3d.algorithms.health import (
    SpikeMonitor,
    explained_variance,
    logprob_mismatch,
    nonfinite_rows,
)


def test_mismatch_by_hand() -> None:
    rollout = torch.tensor([[math.log(0.5), math.log(0.25), math.nan]])
    train = torch.tensor([[math.log(0.25), math.log(0.25), 0.0]])
    report = logprob_mismatch(rollout, train, torch.tensor([[1.0, 1.0, 0.0]]))
    ln2 = math.log(2)
    assert math.isnan(report.pop("pearson_r"))  # train is constant
    assert report == pytest.approx(
        {
            "abs_diff_mean": ln2 / 2,
            "abs_diff_max": ln2,
            "kl_k3": (0.5 - 1 + ln2) / 2,
            "prob_diff_mean": 0.125,
            "prob_diff_max": 0.25,
        },
        rel=1e-5,
    )


def test_pearson_agrees_with_numpy() -> None:
    rng = torch.Generator().manual_seed(0)
    rollout = -torch.rand(3, 4, generator=rng)
    train = rollout + 0.1 * torch.randn(3, 4, generator=rng)
    mask = torch.ones(3, 4)
    expected = np.corrcoef(rollout.exp().flatten(), train.exp().flatten())[0, 1]
    assert logprob_mismatch(rollout, train, mask)["pearson_r"] == pytest.approx(expected, rel=1e-5)
    same = logprob_mismatch(rollout, rollout, mask)
    assert same["abs_diff_max"] == same["kl_k3"] == same["prob_diff_max"] == 0.0
    assert same["pearson_r"] == pytest.approx(1.0)


def test_mismatch_needs_a_token() -> None:
    with pytest.raises(ValueError, match="no response token"):
        logprob_mismatch(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, math.nan]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.zeros(1, 4), returns, mask) == 0.0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)  # error 2R: 1 - 4
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask))


def test_spike_is_measured_against_the_median_before_it() -> None:
    monitor = SpikeMonitor(window=3, least=3)
    assert all(math.isnan(monitor.ratio(x)) for x in (1.0, 2.0, 3.0))
    assert monitor.ratio(20.0) == 10  # median of 1, 2, 3
    assert monitor.ratio(6.0) == 2  # of 2, 3, 20
    assert math.isnan(monitor.ratio(math.nan))
    again = SpikeMonitor(window=3, least=3)
    again.load_state_dict(monitor.state_dict())
    assert again.ratio(12.0) == monitor.ratio(12.0) == 2  # of 3, 20, 6


def test_nonfinite_rows_names_row_and_column() -> None:
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    columns = {
        "fine": torch.tensor([[0.0, math.nan], [0.0, 0.0], [0.0, 0.0]]),
        "values": torch.tensor([[0.0, 0.0], [0.0, math.inf], [math.nan, 0.0]]),
        "returns": torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -math.inf]]),
    }
    assert nonfinite_rows(columns, mask) == {1: ["values"], 2: ["values", "returns"]}
