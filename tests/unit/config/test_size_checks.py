"""The checks of batch sizes, token budgets, layouts and devices: keys and arithmetic are shown."""

from __future__ import annotations

import pytest
from support.checking import BUDGET, GPUS_4, GPUS_8, make, says

from rlhf3d.batching.units import plan_unit_micro_batches
from rlhf3d.config.checks import check
from rlhf3d.config.derived import micro_batching_of
from rlhf3d.config.size_checks import rows_of_trajectory_notes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # batch sizes
        (
            ["data.train_batch_size=10"],
            "data.train_batch_size = 10 … actor.ppo_mini_batch_size = 16 … 10 % 16 = 10",
        ),
        (
            ["critic.ppo_mini_batch_size=12"],
            "data.train_batch_size = 16 … critic.ppo_mini_batch_size = 12 … 16 % 12 = 4",
        ),
        (
            ["actor.layout.dp=3"],
            "actor.ppo_mini_batch_size = 16 … rollout.n = 1 = 16 … actor.layout.dp = 3 … 16 % 3 = "
            "1",
        ),
        (
            ["critic.layout.dp=3"],
            "critic.ppo_mini_batch_size = 16 … rollout.n = 1 = 16 … critic.layout.dp = 3 … 16 % 3 "
            "= 1",
        ),
        (
            ["actor.layout.dp=2", "actor.ppo_micro_batch_size_per_gpu=3"],
            "actor.ppo_mini_batch_size = 16 … rollout.n = 1 / actor.layout.dp = 2 = 8 … "
            "actor.ppo_micro_batch_size_per_gpu = 3 … 8 % 3 = 2",
        ),
        (
            ["critic.layout={dp: 2}", "critic.ppo_micro_batch_size_per_gpu=3"],
            "critic.ppo_mini_batch_size = 16 … rollout.n = 1 / critic.layout.dp = 2 = 8 … "
            "critic.ppo_micro_batch_size_per_gpu = 3 … 8 % 3 = 2",
        ),
        (
            ["actor.layout={pp: 4, vpp: 2}", "actor.ppo_micro_batch_size_per_gpu=8"],
            "actor.ppo_micro_batch_size_per_gpu = 8 makes 2 … actor.layout.vpp = 2 … "
            "actor.layout.pp = 4",
        ),
        # token budgets
        (
            [BUDGET, "actor.ppo_max_token_len_per_gpu=1023"],
            "actor.ppo_max_token_len_per_gpu = 1023 … 512 + data.max_response_length 512 = 1024 … "
            "set 1024",
        ),
        (
            [
                "actor.layout={tp: 3, sequence_parallel: true}",
                "critic.use_dynamic_bsz=true",
                "critic.ppo_max_token_len_per_gpu=1024",
            ],
            "critic.ppo_max_token_len_per_gpu = 1024 … multiple of actor.layout.tp = 3 = 1026 … "
            "set 1026",
        ),
        (
            [
                "critic.layout={tp: 3, sequence_parallel: true}",
                "critic.use_dynamic_bsz=true",
                "critic.ppo_max_token_len_per_gpu=1025",
            ],
            "critic.ppo_max_token_len_per_gpu = 1025 … multiple of critic.layout.tp = 3 = 1026 … "
            "set 1026",
        ),
        (
            [
                "actor.layout={tp: 3, cp: 2, sequence_parallel: true}",
                BUDGET,
                "actor.ppo_max_token_len_per_gpu=1024",
            ],
            "actor.ppo_max_token_len_per_gpu = 1024 … "
            "multiple of 2 x actor.layout.cp x actor.layout.tp = 12 = 1032 … set 1032",
        ),
        (
            [
                BUDGET,
                "actor.ppo_max_token_len_per_gpu=1024",
                "data.max_response_length=500",
                GPUS_8,
                "actor.layout={tp: 3, sequence_parallel: true}",
            ],
            "actor.ppo_max_token_len_per_gpu = 1024 … 512 + data.max_response_length 500 … "
            "multiple of actor.layout.tp and 128 = 384 = 1152 … set 1152",
        ),
        # layouts and devices
        (
            ["actor.layout.cp=2", GPUS_8, "model.dtype=float32"],
            "actor.layout.cp = 2 … model.dtype = float32 … model.dtype=bfloat16, or cp=1",
        ),
        (
            ["model.share_prefixes=true", GPUS_8],
            "model.share_prefixes = true … cluster.platform = cuda … set model.share_prefixes=auto",
        ),
        (
            ["model.share_prefixes=true", "actor.layout.cp=2"],
            "model.share_prefixes = true … actor.layout.cp = 2 … actor.layout.cp=1",
        ),
        (["actor.layout.vpp=2"], "actor.layout.vpp = 2 … actor.layout.pp … vpp=null"),
        (["critic.layout={pp: 1, vpp: 2}"], "critic.layout.vpp = 2 … critic.layout.pp … vpp=null"),
        (
            ["reward_model={path: judge, layout: {vpp: 2}}", "reward.weights={reward_model: 1.0}"],
            "reward_model.layout.vpp = 2 … reward_model.layout.pp … vpp=null",
        ),
        (
            ["actor.layout.sequence_parallel=true"],
            "actor.layout.sequence_parallel = true … actor.layout.tp",
        ),
        (
            ["actor.layout.overlap_param_gather=true"],
            "actor.layout.overlap_param_gather = true … actor.layout.overlap_grad_reduce = true",
        ),
        (
            [
                "critic.layout={overlap_param_gather: true, overlap_grad_reduce: true, "
                "distributed_optimizer: false}"
            ],
            "critic.layout.overlap_param_gather = true … critic.layout.distributed_optimizer = "
            "true",
        ),
        (
            [GPUS_4, "actor.layout={tp: 4, dp: 2}"],
            "actor.layout: tp 4 x pp 1 x dp 2 = 8 ranks … cluster.num_nodes 1 x gpus_per_node 4 = "
            "4",
        ),
        (
            [
                GPUS_4,
                "actor.layout.tp=4",
                "critic.layout.dp=2",
                "critic.placement=disaggregated",
            ],
            "actor.layout: tp 4 x pp 1 x dp 1 = 4 ranks + critic.layout: tp 1 x pp 1 x dp 2 = 2 "
            "ranks = 6 GPUs … cluster.num_nodes 1 x gpus_per_node 4 = 4",
        ),
    ],
)
def test_refusals(overrides: list[str], expected: str) -> None:
    (problem,) = check(make(*overrides))
    assert says(problem, expected), problem


def test_a_token_budget_needs_no_divisible_counts() -> None:
    sizes = ("actor.layout={pp: 2, dp: 3, vpp: 2}", "actor.ppo_micro_batch_size_per_gpu=5")
    assert len(check(make(*sizes))) == 1
    assert check(make(*sizes, BUDGET)) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["actor.ppo_micro_batch_size_per_gpu=3"], None),
        (
            ["actor.ppo_micro_batch_size_per_gpu=2"],
            "gspo … environment.max_turns = 3 rows … actor.ppo_micro_batch_size_per_gpu = 2",
        ),
        ([BUDGET, "actor.ppo_max_token_len_per_gpu=3072"], None),
        (
            [BUDGET, "actor.ppo_max_token_len_per_gpu=3071"],
            "environment.max_turns 3 x (data.max_prompt_length 512 + data.max_response_length 512) "
            "= 3072 tokens … actor.ppo_max_token_len_per_gpu = 3071",
        ),
    ],
)
def test_room_for_the_rows_of_a_trajectory(overrides: list[str], expected: str | None) -> None:
    """The bound is the one of `plan_unit_micro_batches`, for a row a turn."""
    config = make("actor.policy_loss=gspo", "environment.max_turns=3", *overrides)
    rule = micro_batching_of(config, "actor")
    turns, loss = config.environment.max_turns, config.actor.policy_loss
    notes = list(rows_of_trajectory_notes(config.data, turns, loss, rule))
    assert len(notes) == (expected is not None)
    assert expected is None or says(notes[0], expected)
    if expected is None:
        plan_unit_micro_batches([1024] * 3, [[[0, 1, 2]]], rule)
    else:
        with pytest.raises(ValueError, match="a trajectory of 3 rows"):
            plan_unit_micro_batches([1024] * 3, [[[0, 1, 2]]], rule)
