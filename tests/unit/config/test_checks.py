"""The checks between fields: each refusal names its keys and shows its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checking import GOOD, QUANTISED, make, says

from rlhf3d.algorithms.advantages import ADVANTAGES
from rlhf3d.config.checks import check
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import ConfigError, load_config
from rlhf3d.config.resolve import load_run, resolve_algorithms


def test_good_configuration_passes() -> None:
    assert check(make()) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
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
    ],
)
def test_refusals(overrides: list[str], expected: str) -> None:
    (problem,) = check(make(*overrides))
    assert says(problem, expected), problem


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


def test_every_number_has_a_range_that_its_default_is_in() -> None:
    numbers = [key for key in all_keys() if key.kind.split(" ")[0] in ("int", "float")]
    assert [key.name for key in numbers if not key.rules] == ["reward_model.mean"]
    assert check(make()) == []
