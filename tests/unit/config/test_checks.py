"""The checks between fields: each refusal shows its arithmetic."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.weights import sparse_weights

from rlhf3d.algorithms.advantages import ADVANTAGES
from rlhf3d.config import checks
from rlhf3d.config.checks import check, check_files, value_of
from rlhf3d.config.docs import field_docs
from rlhf3d.config.load import build, merge, parse_override
from rlhf3d.config.schema import Config

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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.train_batch_size=10"],
            "data.train_batch_size = 10 prompts do not divide by actor.ppo_mini_batch_size = 16: 10 % 16 = 10",
        ),
        (
            ["actor.layout.dp=3"],
            "actor.ppo_mini_batch_size = 16 prompts x rollout.n = 1 = 16 sequences do not divide over "
            "actor.layout.dp = 3 ranks: 16 % 3 = 1",
        ),
        (
            ["actor.layout.dp=2", "actor.ppo_micro_batch_size_per_gpu=3"],
            "actor.ppo_mini_batch_size = 16 x rollout.n = 1 / actor.layout.dp = 2 = 8 sequences a rank "
            "do not divide by actor.ppo_micro_batch_size_per_gpu = 3: 8 % 3 = 2",
        ),
        (
            ["critic.ppo_mini_batch_size=12"],
            "data.train_batch_size = 16 prompts do not divide by critic.ppo_mini_batch_size = 12: 16 % 12 = 4",
        ),
        (
            ["actor.layout={pp: 4, vpp: 2}", "actor.ppo_micro_batch_size_per_gpu=8"],
            "actor.ppo_micro_batch_size_per_gpu = 8 makes 2 micro-batches a rank; interleaving "
            "(actor.layout.vpp = 2) needs a multiple of actor.layout.pp = 4",
        ),
        (
            ["actor.use_dynamic_bsz=true", "actor.ppo_max_token_len_per_gpu=1023"],
            "actor.ppo_max_token_len_per_gpu = 1023: below the longest sequence, data.max_prompt_length 512 + "
            "data.max_response_length 512 = 1024 tokens; set 1024 or more",
        ),
        (
            [
                "actor.layout={tp: 3, sequence_parallel: true}",
                "critic.use_dynamic_bsz=true",
                "critic.ppo_max_token_len_per_gpu=1024",
            ],
            "critic.ppo_max_token_len_per_gpu = 1024: below the longest sequence, data.max_prompt_length 512 + "
            "data.max_response_length 512, rounded up to a multiple of actor.layout.tp = 3 = 1026 tokens; "
            "set 1026 or more",
        ),
        (
            [
                "actor.layout={tp: 3, cp: 2, sequence_parallel: true}",
                "actor.use_dynamic_bsz=true",
                "actor.ppo_max_token_len_per_gpu=1024",
            ],
            "actor.ppo_max_token_len_per_gpu = 1024: below the longest sequence, data.max_prompt_length 512 + "
            "data.max_response_length 512, rounded up to a multiple of 2 x actor.layout.cp x actor.layout.tp = 12 = "
            "1032 tokens; set 1032 or more",
        ),
        (
            [
                "actor.use_dynamic_bsz=true",
                "actor.ppo_max_token_len_per_gpu=1024",
                "data.max_response_length=500",
                "cluster={platform: cuda, gpus_per_node: 8}",
                "actor.layout={tp: 3, sequence_parallel: true}",
            ],
            "actor.ppo_max_token_len_per_gpu = 1024: below the longest sequence, data.max_prompt_length 512 + "
            "data.max_response_length 500, rounded up to a multiple of actor.layout.tp and 128 = 384 = 1152 tokens; "
            "set 1152 or more",
        ),
        (
            [
                "actor.layout.cp=2",
                "cluster={platform: cuda, gpus_per_node: 8}",
                "model.dtype=float32",
            ],
            "actor.layout.cp = 2 with model.dtype = float32: Transformer Engine's context-parallel attention is for "
            "bfloat16; set model.dtype=bfloat16, or cp=1",
        ),
        (
            ["actor.layout.vpp=2"],
            "actor.layout.vpp = 2: needs actor.layout.pp above 1; set vpp=null",
        ),
        (
            ["actor.layout.sequence_parallel=true"],
            "actor.layout.sequence_parallel = true: needs actor.layout.tp above 1",
        ),
        (
            ["actor.layout.overlap_param_gather=true"],
            "actor.layout.overlap_param_gather = true: needs actor.layout.overlap_grad_reduce = true",
        ),
        (
            [
                "critic.layout={overlap_param_gather: true, overlap_grad_reduce: true, distributed_optimizer: false}"
            ],
            "critic.layout.overlap_param_gather = true: needs critic.layout.distributed_optimizer = true",
        ),
        (
            ["critic.layout={pp: 1, vpp: 2}"],
            "critic.layout.vpp = 2: needs critic.layout.pp above 1; set vpp=null",
        ),
        (
            ["critic.layout.dp=3"],
            "critic.ppo_mini_batch_size = 16 prompts x rollout.n = 1 = 16 sequences do not divide over "
            "critic.layout.dp = 3 ranks: 16 % 3 = 1",
        ),
        (
            ["critic.layout={dp: 2}", "critic.ppo_micro_batch_size_per_gpu=3"],
            "critic.ppo_mini_batch_size = 16 x rollout.n = 1 / critic.layout.dp = 2 = 8 sequences a rank "
            "do not divide by critic.ppo_micro_batch_size_per_gpu = 3: 8 % 3 = 2",
        ),
        (
            [
                "critic.layout={tp: 3, sequence_parallel: true}",
                "critic.use_dynamic_bsz=true",
                "critic.ppo_max_token_len_per_gpu=1025",
            ],
            "critic.ppo_max_token_len_per_gpu = 1025: below the longest sequence, data.max_prompt_length 512 + "
            "data.max_response_length 512, rounded up to a multiple of critic.layout.tp = 3 = 1026 tokens; "
            "set 1026 or more",
        ),
        (
            [
                "cluster={platform: cuda, gpus_per_node: 4}",
                "actor.layout.tp=4",
                "critic.layout.dp=2",
                "critic.placement=disaggregated",
            ],
            "actor.layout: tp 4 x pp 1 x dp 1 = 4 ranks + critic.layout: tp 1 x pp 1 x dp 2 = 2 ranks = 6 GPUs, more "
            "than cluster.num_nodes 1 x gpus_per_node 4 = 4 GPUs",
        ),
        (
            [
                "rollout.n=2",
                "algorithm.filter_groups={enable: true, metric: seq_final_reward}",
                "algorithm.use_kl_in_reward=true",
            ],
            "algorithm.filter_groups.metric = seq_final_reward with algorithm.use_kl_in_reward: groups are chosen "
            "before the log-probs that the KL needs are computed; set metric=seq_reward, or use actor.use_kl_loss",
        ),
        (
            ["reward.weights={accuracy: 1.0, reward_model: 0.5}"],
            "reward.weights has reward_model, but reward_model.path is not set: name its folder",
        ),
        (
            ["reward_model.path=judge"],
            "reward_model.path = judge: reward.weights gives it no weight; set reward.weights={reward_model: 1.0}, or "
            "with a rule {accuracy: 1.0, reward_model: 0.5}",
        ),
        (
            [
                "reward_model.path=judge",
                "reward.weights={reward_model: 1.0}",
                "custom_reward_function.path=mine.py",
            ],
            "custom_reward_function.path = mine.py: reward.weights gives accuracy, which is what it scores, no weight; "
            "add accuracy to reward.weights, or set path=null",
        ),
        (
            ["reward.weights={}"],
            "reward.weights = {}: nothing is rewarded; set {accuracy: 1.0} or {reward_model: 1.0}",
        ),
        (
            ["reward_model={path: judge, layout: {vpp: 2}}", "reward.weights={reward_model: 1.0}"],
            "reward_model.layout.vpp = 2: needs reward_model.layout.pp above 1; set vpp=null",
        ),
        (["critic.layout.tp=0"], "critic.layout.tp = 0: must be at least 1"),
        (
            ["rollout.quantization=fp8_per_channel"],
            "rollout.quantization = fp8_per_channel: what samples is not what trains; set "
            "algorithm.rollout_correction.rollout_is=token (or rollout_rs, or bypass_mode)",
        ),
        (
            [*QUANTISED, "rollout.dtype=float32"],
            "rollout.quantization = fp8_per_channel: quantises bfloat16; set rollout.dtype=bfloat16, not float32",
        ),
        (
            [*QUANTISED, "rollout.tensor_parallel_size=2"],
            "rollout.quantization = fp8_per_channel: a weight's scales are those of all its columns, so it must be on "
            "one rank; set rollout.tensor_parallel_size=1, not 2, and more rollout.engines",
        ),
        (
            ["rollout.top_p=0.9"],
            "rollout.top_p = 0.9: training needs the full vocabulary; set 1.0 (off)",
        ),
        (
            ["rollout.top_k=50"],
            "rollout.top_k = 50: training needs the full vocabulary; set -1 (off)",
        ),
        (
            ["algorithm.adv_estimator=grpo"],
            "rollout.n = 1: algorithm.adv_estimator = grpo compares completions; set 2 or more",
        ),
        (
            ["algorithm.adv_estimator=grop", "rollout.n=2"],
            "algorithm.adv_estimator = 'grop': must be one of gae, grpo, rloo, reinforce_plus_plus, "
            "reinforce_plus_plus_baseline, remax, opo; did you mean grpo?",
        ),
        (
            ["algorithm.filter_groups.enable=true"],
            "rollout.n = 1: algorithm.filter_groups compares a prompt's completions; set 2 or more",
        ),
        (
            ["data.gen_batch_size=48"],
            "data.gen_batch_size = 48: without algorithm.filter_groups a step generates its "
            "data.train_batch_size = 16 prompts; set null",
        ),
        (
            ["reward.overlong_buffer={enable: true, len: 600}"],
            "reward.overlong_buffer.len = 600: longer than data.max_response_length = 512",
        ),
        (
            ["algorithm.rollout_correction={bypass_mode: true, rollout_is: token}"],
            "algorithm.rollout_correction.bypass_mode = true: the loss's own ratio is the correction, so rollout_is "
            "and rollout_rs must be null; for truncated weights without PPO's clip set actor.policy_loss=cispo",
        ),
        (
            ["algorithm.rollout_correction={rollout_is: token, rollout_is_threshold: 0.52}"],
            "algorithm.rollout_correction.rollout_is_threshold = 0.52: engines that agree have ratio 1, which must "
            "lie within; write a range as 0.5_2.0, with both decimal points",
        ),
        (
            ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl={type: adaptive, horizon: 3}"],
            "algorithm.kl_ctrl.horizon = 3: too short for steps of data.train_batch_size x rollout.n = 16 sequences; "
            "set it above 3",
        ),
        (["rollout.n=0"], "rollout.n = 0: must be at least 1"),
        (["actor.optim.lr=0"], "actor.optim.lr = 0.0: must be above 0"),
        (["algorithm.lam=1.5"], "algorithm.lam = 1.5: must be at most 1"),
        (["algorithm.gamma=-0.5"], "algorithm.gamma = -0.5: must be 0 or more"),
        (["model.dtype=fp8"], "model.dtype = 'fp8': must be one of auto, bfloat16, float32"),
        (
            ["actor.optim.betas=[0.9, 1.0]"],
            "actor.optim.betas = [0.9, 1.0]: each must be in [0, 1)",
        ),
        (["actor.optim.min_lr=1"], "actor.optim.min_lr = 1.0: above actor.optim.lr = 1e-06"),
        (["data.val_max_samples=0"], "data.val_max_samples = 0: must be 1 or more, or -1 (all)"),
        (
            ["trainer.keep_best=1"],
            "trainer.keep_best = 1: every checkpoint is kept; set trainer.keep_last too",
        ),
        (
            [
                "trainer.keep_best=1",
                "trainer.keep_last=1",
                "trainer.save_freq=15",
                "trainer.test_freq=10",
            ],
            "trainer.save_freq = 15: with trainer.keep_best it must be a multiple of trainer.test_freq = 10, so that "
            "each checkpoint has a validation of its step",
        ),
        (
            ["trainer.total_training_steps=5", "trainer.critic_warmup=5"],
            "trainer.critic_warmup = 5: leaves no step of 5 to train the actor",
        ),
        (
            ["trainer.total_training_steps=5", "actor.optim.lr_warmup_steps=6"],
            "actor.optim.lr_warmup_steps = 6: longer than trainer.total_training_steps = 5",
        ),
        (
            ["cluster={platform: cuda, gpus_per_node: 4}", "actor.layout={tp: 4, dp: 2}"],
            "actor.layout: tp 4 x pp 1 x dp 2 = 8 ranks, more than cluster.num_nodes 1 x gpus_per_node 4 = 4 GPUs",
        ),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    assert check(make(*overrides)) == [message]


def test_critic_fields_do_not_matter_without_critic() -> None:
    grpo = ("algorithm.adv_estimator=grpo", "rollout.n=2")
    assert check(make(*grpo, "critic.ppo_mini_batch_size=3", "critic.layout.dp=3")) == []
    assert "has no critic" in check(make(*grpo, "trainer.critic_warmup=1"))[0]


def test_truncated_sampling_needs_a_correction() -> None:
    assert check(make(*QUANTISED)) == []
    assert check(make("rollout.top_p=0.9", "algorithm.rollout_correction.rollout_is=token")) == []
    assert check(make("rollout.top_k=50", "algorithm.rollout_correction.bypass_mode=true")) == []


def test_a_users_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file registers is valid and decides whether there is a critic; a broken file is told once."""
    monkeypatch.setattr(ADVANTAGES, "_entries", ADVANTAGES.entries())
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from rlhf3d.algorithms.advantages import register_advantage\n"
        "@register_advantage('of_test_checks', needs_values=True)\n"
        "def mine(inputs): return inputs.values, inputs.values\n"
    )
    own = (f"algorithm.custom_path={mine}", "algorithm.adv_estimator=of_test_checks")
    assert check(make(*own)) == [] and make(*own).needs_critic
    near = check(make(own[0], "algorithm.adv_estimator=of_test_check"))[0]
    assert near.endswith("did you mean of_test_checks?")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    (problem,) = check(make(f"algorithm.custom_path={broken}"))
    assert problem.startswith(
        f"algorithm.custom_path: {broken} does not import: ModuleNotFoundError"
    )


def test_a_token_budget_needs_no_divisible_counts() -> None:
    sizes = ("actor.layout={pp: 2, dp: 3, vpp: 2}", "actor.ppo_micro_batch_size_per_gpu=5")
    assert len(check(make(*sizes))) == 1
    assert check(make(*sizes, "actor.use_dynamic_bsz=true")) == []


def test_every_number_has_a_range() -> None:
    """A key that is added to the schema is not forgotten here."""
    ranged = {*checks.AT_LEAST_1, *checks.ABOVE_0, *checks.NOT_NEGATIVE, *checks.AT_MOST_1}
    checked_elsewhere = {
        "reward_model.mean",
        "actor.clip_ratio_c",
        "data.val_max_samples",
        "rollout.top_p",
        "rollout.top_k",
    }
    numbers = {doc.name for doc in field_docs() if doc.kind.split(" ")[0] in ("int", "float")}
    assert numbers - ranged == checked_elsewhere
    assert ranged <= numbers
    assert all(value_of(Config(), name) in allowed for name, allowed in checks.ONE_OF.items())


def test_names_are_those_that_are_registered() -> None:
    from rlhf3d.algorithms import advantages, aggregation, kl, losses

    assert set(advantages.ADVANTAGES.names()) == set(checks.ADV_ESTIMATORS)
    assert set(losses.POLICY_LOSSES.names()) == set(checks.ONE_OF["actor.policy_loss"])
    assert set(kl.KL_KINDS) == set(checks.KL_TYPES)
    assert set(aggregation.AGGREGATION_MODES) == set(checks.LOSS_AGG_MODES)


def write_model(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 36, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 48, "vocab_size": 96, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return sparse_weights(folder)


def test_files(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "m"), tmp_path / "t.parquet"
    data.touch()
    present = (f"model.path={model}", f"data.train_files={data}")
    assert check_files(make(*present)) == []
    assert "no file gone.parquet" in check_files(make(*present, "data.val_files=gone.parquet"))[0]
    assert (
        "no such Python file"
        in check_files(make(*present, "custom_reward_function.path=gone.py"))[0]
    )
    assert check_files(make(*present, "model.path=gone"))[0].startswith(
        "model.path: no folder 'gone'"
    )
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)
    (problem,) = check_files(make(*present))  # found here, before any process of a rank
    assert problem.startswith("model.path: ") and "bytes, its header says" in problem


def test_model_against_layout_and_lengths(tmp_path: Path) -> None:
    data = tmp_path / "t.parquet"
    data.touch()
    present = (f"model.path={write_model(tmp_path / 'm')}", f"data.train_files={data}")
    assert "9 % tp 2 = 1" in check_files(make(*present, "actor.layout.tp=2"))[0]
    assert "6 % pp 4 = 2" in check_files(make(*present, "actor.layout.pp=4"))[0]
    of_critic = check_files(make(*present, "critic.layout.tp=2"))[0]
    assert of_critic.startswith("critic.layout: TP2") and "9 % tp 2 = 1" in of_critic
    assert (
        "ep 2, but the model is dense"
        in check_files(make(*present, "actor.layout={dp: 2, ep: 2}"))[0]
    )
    uneven = "actor.layout={pp: 4, first_stage_layers: 1}"
    assert (
        "6 - first 1 = 5 layers for the other 3 of pp 4" in check_files(make(*present, uneven))[0]
    )
    assert (
        "rollout.tensor_parallel_size 2 does not fit this model: num_attention_heads 9 % 2 = 1"
        in (check_files(make(*present, "rollout.tensor_parallel_size=2"))[0])
    )
    assert (
        "512 + data.max_response_length 600 = 1112 tokens, more than the model's window of 1024"
        in (check_files(make(*present, "data.max_response_length=600"))[0])
    )
