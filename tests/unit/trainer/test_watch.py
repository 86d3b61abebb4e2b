"""What a run says about numbers that look wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.data.loader import Prompt
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import Completion
from rlhf3d.trainer.experience import Experience, Scored
from rlhf3d.trainer.watch import Watch


def scored(*values: float) -> Scored:
    prompts = [Prompt((1,), "test", "", {}, i, "") for i in range(len(values))]
    completions = [Completion((7,), (0.0,), "stop", 0) for _ in values]
    scores = [Score(v, Outcome.SCORED) for v in values]
    return Scored(
        Experience(prompts, completions, [""] * len(values)), scores, torch.tensor(values)
    )


def test_equal_rewards_are_said_and_counted() -> None:
    said: list[str] = []
    watch = Watch(said.append, "stop", 5.0)
    watch.scores(1, scored(0, 0, 1, 1), n=2)
    watch.scores(2, scored(0, 0, 1, 1), n=2)
    assert (
        "step 2: all 2 groups of 2 have equal rewards (between 0 and 1)" in said[1]
        and "2 such step(s)" in said[1]
    )
    watch.scores(3, scored(0, 1, 1, 1), n=2)
    watch.scores(4, scored(0, 1), n=1)
    assert len(said) == 2
    watch.scores(5, scored(3, 3), n=1)
    assert "all 2 completions have equal rewards" in said[2] and "1 such step(s)" in said[2]


def batch(**columns: torch.Tensor) -> Batch:
    return from_sequences([[1]] * 2, [[5, 6], [7]], 0).with_columns(**columns)


def test_broken_numbers_stop_or_are_said() -> None:
    good = batch(old_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, math.nan]]))  # the NaN is padding
    bad = batch(
        old_logprobs=torch.tensor([[-1.0, -2.0], [-math.inf, 0.0]]),
        values=torch.full((2, 2), math.nan),
    )
    said: list[str] = []
    watch = Watch(said.append, "skip", 5.0)
    watch.batch(3, good)
    watch.batch(3, bad)
    assert len(said) == 1 and "sequence 0 (values); sequence 1 (old_logprobs, values)" in said[0]
    with pytest.raises(
        RuntimeError,
        match=r"numbers of 2 of 2 sequences are not finite.*step_3\.jsonl.*on_nonfinite",
    ):
        Watch(said.append, "stop", 5.0).batch(3, bad)


def test_spikes_and_skipped_steps_are_said() -> None:
    said: list[str] = []
    watch = Watch(said.append, "skip", 5.0)
    for step in range(5):
        assert math.isnan(watch.update(step, {"actor/grad_norm": 2.0})["actor/grad_norm_ratio"])
    assert (
        watch.update(6, {"actor/grad_norm": 8.0}) == {"actor/grad_norm_ratio": 4.0} and said == []
    )
    again = Watch(said.append, "skip", 5.0)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    found = again.update(
        7, {"actor/grad_norm": 12.0, "actor/skipped_steps": 0.0, "critic/skipped_steps": 2.0}
    )
    assert found == {"actor/grad_norm_ratio": 6.0}
    assert "gradient norm of the actor 12, 6.0 times" in said[0]
    assert "2 optimizer step(s) of the critic left out" in said[1]
