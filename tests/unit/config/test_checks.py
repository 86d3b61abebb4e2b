"""The checks between fields: each refusal names its keys and shows its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.algorithms.advantages import ADVANTAGES
from rlhf3d.batching.units import plan_unit_micro_batches
from rlhf3d.config.checks import check
from rlhf3d.config.derived import micro_batching_of
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import ConfigError, build, load_config, merge, parse_override
from rlhf3d.config.resolve import load_run, resolve_algorithms
from rlhf3d.config.schema import Config
from rlhf3d.config.size_checks import rows_of_trajectory_notes

GOOD = (
    "model.path=m",
    "data.train_files=t.parquet",
    "data.train_batch_size=16",
    "actor.ppo_mini_batch_size=16",
)
QUANTISED = (
    "rollout.quantization=fp8_per_channel",
    "algorithm.rollout_correction.rollout_is=token",
)
BYPASS = "algorithm.rollout_correction.bypass_mode=true"
IN_FLIGHT = "rollout={update: in_flight, max_staleness: 1, placement: disaggregated}"
GPUS_8 = "cluster={platform: cuda, gpus_per_node: 8}"
GPUS_4 = "cluster={platform: cuda, gpus_per_node: 4}"
BUDGET = "actor.use_dynamic_bsz=true"


def make(*overrides: str) -> Config:
    raw: dict = {}
    for override in (*GOOD, *overrides):
        merge(raw, parse_override(override))
    mistakes: list[str] = []
    config = build(Config(), raw, "", mistakes)
    assert not mistakes
    return config


def test_good_configuration_passes() -> None:
    assert check(make()) == []


def says(problem: str, expected: str) -> bool:
    """Whether a message has these pieces, which … separates, in this order."""
    for piece in expected.split(" … "):
        _, found, problem = problem.partition(piece)
        if not found:
            return False
    return True


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
        # sampling
        (
            ["rollout.quantization=fp8_per_channel"],
            "rollout.quantization = fp8_per_channel … "
            "algorithm.rollout_correction.rollout_is=token",
        ),
        (
            [*QUANTISED, "rollout.dtype=float32"],
            "rollout.quantization = fp8_per_channel … rollout.dtype=bfloat16",
        ),
        (
            [*QUANTISED, "rollout.tensor_parallel_size=2"],
            "rollout.quantization = fp8_per_channel … rollout.tensor_parallel_size=1, not 2",
        ),
        (["rollout.top_p=0.9"], "rollout.top_p = 0.9 … set 1.0"),
        (["rollout.top_k=50"], "rollout.top_k = 50 … set -1"),
        (
            ["algorithm.adv_estimator=grpo"],
            "rollout.n = 1 … algorithm.adv_estimator = grpo … set 2 or more",
        ),
        (
            ["algorithm.filter_groups.enable=true"],
            "rollout.n = 1 … algorithm.filter_groups … set 2 or more",
        ),
        (
            [
                "rollout.n=2",
                "algorithm.filter_groups={enable: true, metric: seq_final_reward}",
                "algorithm.use_kl_in_reward=true",
            ],
            "algorithm.filter_groups.metric = seq_final_reward … algorithm.use_kl_in_reward … "
            "metric=seq_reward",
        ),
        (
            ["data.gen_batch_size=48"],
            "data.gen_batch_size = 48 … algorithm.filter_groups … data.train_batch_size = 16 … set "
            "null",
        ),
        (["data.val_max_samples=0"], "data.val_max_samples = 0 … 1 or more, or -1"),
        # rewards and corrections
        (
            ["reward.weights={accuracy: 1.0, reward_model: 0.5}"],
            "reward.weights … reward_model.path",
        ),
        (
            ["reward_model.path=judge"],
            "reward_model.path = judge … reward.weights={reward_model: 1.0}",
        ),
        (
            [
                "reward_model.path=judge",
                "reward.weights={reward_model: 1.0}",
                "custom_reward_function.path=mine.py",
            ],
            "custom_reward_function.path = mine.py … accuracy … reward.weights … path=null",
        ),
        (["reward.weights={}"], "reward.weights = {} … {accuracy: 1.0}"),
        (
            ["reward.overlong_buffer={enable: true, len: 600}"],
            "reward.overlong_buffer.len = 600 … data.max_response_length = 512",
        ),
        (
            ["algorithm.rollout_correction={bypass_mode: true, rollout_is: token}"],
            "algorithm.rollout_correction.bypass_mode = true … rollout_is … "
            "actor.policy_loss=cispo",
        ),
        (
            ["algorithm.rollout_correction={rollout_is: token, rollout_is_threshold: 0.52}"],
            "algorithm.rollout_correction.rollout_is_threshold = 0.52 … ratio 1 … 0.5_2.0",
        ),
        (
            ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl={type: adaptive, horizon: 3}"],
            "algorithm.kl_ctrl.horizon = 3 … data.train_batch_size x rollout.n = 16 … above 3",
        ),
        # ranges and choices, which stand at the fields
        (["rollout.n=0"], "rollout.n = 0 … at least 1"),
        (["critic.layout.tp=0"], "critic.layout.tp = 0 … at least 1"),
        (["actor.optim.lr=0"], "actor.optim.lr = 0.0 … above 0"),
        (["algorithm.lam=1.5"], "algorithm.lam = 1.5 … at most 1"),
        (["algorithm.gamma=-0.5"], "algorithm.gamma = -0.5 … at least 0"),
        (
            ["rollout.gpu_memory_utilization=1.5"],
            "rollout.gpu_memory_utilization = 1.5 … at most 1",
        ),
        (["actor.optim.betas=[0.9, 1.0]"], "actor.optim.betas = [0.9, 1.0] … below 1"),
        (["actor.clip_ratio_c=1"], "actor.clip_ratio_c = 1.0 … above 1"),
        (["actor.kl_loss_type=k4"], "actor.kl_loss_type = 'k4' … one of k1, kl, abs"),
        (
            ["algorithm.adv_estimator=grop", "rollout.n=2"],
            "algorithm.adv_estimator = 'grop' … one of gae, grpo, rloo … did you mean grpo?",
        ),
        (["actor.optim.min_lr=1"], "actor.optim.min_lr = 1.0 … actor.optim.lr = 1e-06"),
        # the schedule
        (["trainer.keep_best=1"], "trainer.keep_best = 1 … trainer.keep_last"),
        (
            [
                "trainer.keep_best=1",
                "trainer.keep_last=1",
                "trainer.save_freq=15",
                "trainer.test_freq=10",
            ],
            "trainer.save_freq = 15 … trainer.keep_best … trainer.test_freq = 10",
        ),
        (
            ["trainer.total_training_steps=5", "trainer.critic_warmup=5"],
            "trainer.critic_warmup = 5 … no step of 5",
        ),
        (
            ["trainer.total_training_steps=5", "trainer.profile_steps=[3, 7]"],
            "trainer.profile_steps = [3, 7]: step 7 … trainer.total_training_steps = 5",
        ),
        (
            ["trainer.total_training_steps=5", "actor.optim.lr_warmup_steps=6"],
            "actor.optim.lr_warmup_steps = 6 … trainer.total_training_steps = 5",
        ),
        # environments
        (["environment.name=Game"], "environment.name = Game … environment.path is not set"),
        (
            ["environment.path=e.py", "data.overlong_prompts=truncate_right"],
            "data.overlong_prompts = truncate_right … environment.path = e.py … truncate_left",
        ),
        (
            ["environment.path=e.py", "environment.max_turn_tokens=99999"],
            "environment.max_turn_tokens = 99999 … data.max_response_length",
        ),
        (
            ["environment.path=e.py", "environment.call_timeout_s=700"],
            "environment.call_timeout_s = 700 … environment.trajectory_timeout_s = 600",
        ),
        (
            ["environment.path=e.py", "environment.tool_format=herms"],
            "environment.tool_format = 'herms' … did you mean hermes? … FILE.py:FUNCTION",
        ),
        (
            ["reward.weights={environment: 1.0}"],
            "reward.weights has environment … environment.path is not set",
        ),
        (
            [
                "environment.path=e.py",
                "reward.weights={environment: 1.0}",
                "custom_reward_function.path=r.py",
            ],
            "custom_reward_function.path = r.py … accuracy",
        ),
        # asynchronous training
        (
            ["rollout.max_staleness=1"],
            "rollout.max_staleness = 1 … bypass_mode=true … rollout_is=token",
        ),
        (
            ["rollout.max_staleness=1", BYPASS, "rollout.sleep=true"],
            "rollout.sleep = true … rollout.max_staleness = 1 … rollout.sleep=false",
        ),
        (
            ["rollout.max_staleness=1", BYPASS, "actor.policy_loss=pg"],
            "actor.policy_loss = pg … rollout.max_staleness = 1 … policy_loss=vanilla",
        ),
        (
            ["rollout={update: in_flight, placement: disaggregated}"],
            "rollout.update = in_flight … rollout.max_staleness = 0 … rollout.max_staleness=1",
        ),
        (
            ["rollout={update: in_flight, max_staleness: 1}", BYPASS],
            "rollout.update = in_flight … rollout.placement = colocated … disaggregated",
        ),
        (
            [IN_FLIGHT, BYPASS, "environment={path: e.py, rounds: true}"],
            "environment.rounds = true … rollout.update = in_flight … environment.rounds=false",
        ),
    ],
)
def test_refusals(overrides: list[str], expected: str) -> None:
    (problem,) = check(make(*overrides))
    assert says(problem, expected), problem


CORRECTION = "algorithm.rollout_correction"


@pytest.mark.parametrize(
    "stated",
    [
        BYPASS,
        f"{CORRECTION}.rollout_is=sequence",
        f"{CORRECTION}={{rollout_rs: token_k1, rollout_rs_threshold: 2.0}}",
    ],
)
def test_staleness_with_a_stated_old_policy(stated: str) -> None:
    assert check(make("rollout.max_staleness=2", stated)) == []
    assert check(make(IN_FLIGHT, stated)) == []


def test_what_asynchronous_training_works_with() -> None:
    for mode in ("rollout.max_staleness=1", IN_FLIGHT):
        for overrides in (
            ["algorithm={adv_estimator: grpo, filter_groups: {enable: true}}", "rollout.n=2"],
            ["algorithm.adv_estimator=remax"],
            ["environment.path=e.py"],
            ["reward_model.path=r", "reward.weights={reward_model: 1.0}"],
            ["actor.ppo_mini_batch_size=8", "actor.ppo_epochs=2"],
            ["trainer.critic_warmup=2"],
        ):
            assert check(make(mode, BYPASS, *overrides)) == []


def test_both_ways_to_state_the_old_policy_have_a_line() -> None:
    (problem,) = check(make("rollout.max_staleness=1"))
    why, engines, recomputed = problem.splitlines()
    assert "clipping off" in why
    assert "bypass_mode=true" in engines
    assert "rollout_is=token" in recomputed
    assert f"\n    {engines}\n    {recomputed}" in str(ConfigError([problem]))


def test_critic_fields_do_not_matter_without_critic() -> None:
    grpo = ("algorithm.adv_estimator=grpo", "rollout.n=2")
    assert check(make(*grpo, "critic.ppo_mini_batch_size=3", "critic.layout.dp=3")) == []
    assert says(
        check(make(*grpo, "trainer.critic_warmup=1"))[0], "trainer.critic_warmup = 1 … grpo"
    )


def test_truncated_sampling_needs_a_correction() -> None:
    assert check(make(*QUANTISED)) == []
    assert check(make("rollout.top_p=0.9", "algorithm.rollout_correction.rollout_is=token")) == []
    assert check(make("rollout.top_k=50", "algorithm.rollout_correction.bypass_mode=true")) == []


def test_a_users_file_is_executed_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and checking do not execute it.

    Resolving does, and what the estimator needs becomes data.
    """
    monkeypatch.setattr(ADVANTAGES, "_entries", ADVANTAGES.entries())
    mine, ran = tmp_path / "mine.py", tmp_path / "ran"
    mine.write_text(
        "from pathlib import Path\n"
        "from rlhf3d.algorithms.advantages import register_advantage\n"
        f"Path({str(ran)!r}).touch()\n"
        "@register_advantage('of_test_checks', needs_values=True)\n"
        "def mine(inputs): return inputs.values, inputs.values\n"
    )
    own = (f"algorithm.custom_path={mine}", "algorithm.adv_estimator=of_test_checks")
    file = tmp_path / "run.yaml"
    file.write_text("")
    uneven = (*GOOD, *own, "critic.ppo_mini_batch_size=12")
    config = load_config(file, uneven)
    assert not config.algorithm.is_resolved and not ran.exists()
    with pytest.raises(ConfigError) as caught:
        load_run(file, uneven)
    (problem,) = caught.value.problems
    assert says(problem, "critic.ppo_mini_batch_size = 12 … 16 % 12 = 4") and ran.exists()
    resolved = load_run(file, (*GOOD, *own))
    assert resolved.needs_critic and resolved.algorithm.needs.values
    with pytest.raises(ConfigError) as caught:
        load_run(file, (*GOOD, own[0], "algorithm.adv_estimator=of_test_check", "rollout.n=0"))
    first, second = caught.value.problems
    assert says(first, "rollout.n = 0") and says(second, "did you mean of_test_checks?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "from rlhf3d.algorithms.advantages import register_advantage\n"
            "register_advantage('of_test_check')(lambda inputs: None)\n",
            "algorithm.adv_estimator = 'of_test_checks' … did you mean of_test_check?",
        ),
        (
            "import nothing_of_this_name\n",
            "algorithm.custom_path: … broken.py … ModuleNotFoundError",
        ),
    ],
)
def test_a_users_file_that_does_not_serve(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ADVANTAGES, "_entries", ADVANTAGES.entries())
    broken = tmp_path / "broken.py"
    broken.write_text(text)
    own = (f"algorithm.custom_path={broken}", "algorithm.adv_estimator=of_test_checks")
    with pytest.raises(ConfigError) as caught:
        resolve_algorithms(make(*own))
    (problem,) = caught.value.problems
    assert says(problem, expected), problem


def test_a_token_budget_needs_no_divisible_counts() -> None:
    sizes = ("actor.layout={pp: 2, dp: 3, vpp: 2}", "actor.ppo_micro_batch_size_per_gpu=5")
    assert len(check(make(*sizes))) == 1
    assert check(make(*sizes, BUDGET)) == []


def test_every_number_has_a_range_that_its_default_is_in() -> None:
    numbers = [key for key in all_keys() if key.kind.split(" ")[0] in ("int", "float")]
    assert [key.name for key in numbers if not key.rules] == ["reward_model.mean"]
    assert check(make()) == []


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
