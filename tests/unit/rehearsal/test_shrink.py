"""What divides in a job divides in its miniature, and what does not does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf3d.config.checks import check
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.groups import parallel_layout, worker_groups
from rlhf3d.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    ClusterConfig,
    Config,
    CriticConfig,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RolloutCorrectionConfig,
    TrainerConfig,
)
from rlhf3d.inputs import check_model
from rlhf3d.models.spec import parse_config
from rlhf3d.parallel.platform import choose_platform
from rlhf3d.placement.resources import place
from rlhf3d.rehearsal.shrink import (
    ENGINE_RANKS,
    cut_layout,
    repeats,
    shrink_config,
    shrink_layout,
    shrink_model,
)

QWEN_7B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
QWEN3_MOE = {
    **QWEN_7B,
    "model_type": "qwen3_moe",
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "head_dim": 128,
    "hidden_size": 2048,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


@given(
    kv=st.integers(1, 16),
    group=st.integers(1, 8),
    ffn=st.integers(100, 30000),
    vocab=st.integers(1000, 200000),
    tps=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3),
)
def test_a_shrunk_model_divides_as_the_model(
    kv: int, group: int, ffn: int, vocab: int, tps: list[int]
) -> None:
    shape = QWEN_7B | {
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "hidden_size": 64 * kv * group,
        "intermediate_size": ffn,
        "vocab_size": vocab,
    }
    small = shrink_model(shape, tps, 1, 2)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert 0 < small[key] <= max(shape[key], 400)
        for tp in tps:
            assert small[key] % tp == shape[key] % tp, (key, tp)
    assert small["num_attention_heads"] // small["num_key_value_heads"] == group
    parse_config(small, "small")


@given(
    middle=st.integers(1, 5),
    pp=st.integers(1, 8),
    vpp=st.sampled_from([1, 2, 4]),
    ends=st.tuples(*[st.none() | st.integers(1, 5)] * 2),
)
def test_shrunk_stages_keep_their_shape(
    middle: int, pp: int, vpp: int, ends: tuple[int | None, int | None]
) -> None:
    first, last = (None if end is None or pp == 1 else end * vpp for end in ends)
    own = [end for end in (first, last) if end is not None]
    layers = sum(own) + (pp - len(own)) * middle * vpp
    layout = LayoutConfig(pp=pp, vpp=vpp, first_stage_layers=first, last_stage_layers=last)
    stages = parallel_layout(layout).stage_layers(layers)
    assume(stages is not None)
    small, few = shrink_layout(layout, layers)
    shrunk = parallel_layout(small).stage_layers(few)
    assert stages is not None and shrunk is not None
    assert [size > min(stages) for size in stages] == [size > min(shrunk) for size in shrunk]
    assert max(shrunk) <= 2 * vpp


@pytest.mark.parametrize(
    ("layout", "room", "wanted"),
    [
        ((2, 2, 2), 16, (2, 2, 2)),
        ((8, 4, 16), 16, (4, 2, 2)),
        ((8, 16, 8), 8, (2, 2, 2)),
        ((4, 1, 8), 3, (2, 1, 1)),
        ((3, 2, 4), 6, (3, 2, 1)),
    ],
)
def test_a_cut_layout_keeps_every_axis_while_there_is_room(
    layout: tuple[int, int, int], room: int, wanted: tuple[int, int, int]
) -> None:
    tp, pp, dp = layout
    cut = cut_layout(LayoutConfig(tp=tp, pp=pp, dp=dp), room, 64)
    assert (cut.tp, cut.pp, cut.dp) == wanted


def test_context_ranks_go_after_replicas() -> None:
    wide = LayoutConfig(tp=2, pp=2, dp=4, cp=4)
    assert cut_layout(wide, 32, 64) == replace(wide, dp=2)
    assert cut_layout(wide, 16, 64) == replace(wide, dp=2, cp=2)
    assert cut_layout(wide, 8, 64) == replace(wide, dp=1, cp=2)


def job(**changes: Any) -> Config:
    layout = LayoutConfig(tp=2, pp=2, dp=2, sequence_parallel=True)
    config = Config(
        model=ModelConfig(path="model"),
        data=DataConfig(
            train_files=("t",),
            val_files=("v",),
            train_batch_size=1024,
            max_prompt_length=1024,
            max_response_length=2048,
        ),
        actor=ActorConfig(
            layout=layout, ppo_mini_batch_size=256, optim=OptimConfig(lr_warmup_steps=10)
        ),
        rollout=RolloutConfig(engines=4, tensor_parallel_size=2),
    )
    return replace(config, **changes)


def shrunk(config: Config, shape: dict[str, Any]) -> tuple[Config, list[str]]:
    made = shrink_config(config, shape, 16)
    small = made.config
    assert check(small) + check_model(small, parse_config(made.model, "small")) == []
    ranks = small.rollout.engines * small.rollout.tensor_parallel_size
    assert ranks <= ENGINE_RANKS and small.data.max_response_length < 300
    assert small.data.max_prompt_length < 100 or small.environment.enabled
    return small, [change.key for change in made.changes]


def test_a_job_keeps_its_layout_and_the_arithmetic_of_its_batches() -> None:
    small, changed = shrunk(job(), QWEN_7B)
    assert small.actor.layout == job().actor.layout
    assert small.data.train_batch_size // small.actor.ppo_mini_batch_size == 2  # of four
    assert changed == ["rollout.engines", "cluster.platform"]


def test_experts_groups_and_a_critic_apart_are_kept() -> None:
    moe = LayoutConfig(tp=2, pp=1, dp=4, ep=4, sequence_parallel=True)
    config = job(
        actor=replace(job().actor, layout=moe),
        critic=CriticConfig(layout=replace(moe, tp=1, dp=2, ep=2, sequence_parallel=False)),
    )
    small, _ = shrunk(config, QWEN3_MOE)
    assert (small.actor.layout.ep, small.critic.layout and small.critic.layout.ep) == (4, 2)
    grouped = job(
        algorithm=AlgorithmConfig(adv_estimator="grpo"),
        rollout=replace(job().rollout, n=8, tensor_parallel_size=8),
    )
    small, changed = shrunk(
        grouped, QWEN_7B | {"num_key_value_heads": 4, "num_attention_heads": 32}
    )
    assert small.rollout.n == 2 and "rollout.tensor_parallel_size" in changed


def test_interleaved_and_uneven_pipelines_get_whole_rounds() -> None:
    layout = LayoutConfig(pp=4, vpp=7, dp=2)
    small, _ = shrunk(job(actor=replace(job().actor, layout=layout)), QWEN_7B)
    a_rank = small.actor.ppo_mini_batch_size * small.rollout.n // small.actor.layout.dp
    assert a_rank % 4 == 0
    uneven = LayoutConfig(pp=4, first_stage_layers=4)
    small, _ = shrunk(job(actor=replace(job().actor, layout=uneven)), QWEN_7B)
    assert small.actor.layout.first_stage_layers == 1


def test_a_reward_model_keeps_its_layout_and_divides_as_it_did() -> None:
    layout = LayoutConfig(tp=3, pp=2, dp=4)
    config = job(
        reward=RewardConfig(weights={"reward_model": 1.0}),
        reward_model=RewardModelConfig("judge", layout),
    )
    shape = QWEN_7B | {
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "hidden_size": 768,
        "num_hidden_layers": 6,
    }
    shape["intermediate_size"] = 3 * 999
    made = shrink_config(config, QWEN_7B, 48, shape)
    assert made.reward is not None and made.config.reward_model.layout == replace(
        layout, dp=2
    )  # a third of 48
    judge = parse_config(made.reward, "judge")
    assert made.reward["num_labels"] == 1 and (
        judge.num_layers,
        judge.num_heads,
        judge.num_kv_heads,
    ) == (2, 6, 3)
    assert (
        check(made.config) + check_model(made.config, parse_config(made.model, "small"), judge)
        == []
    )
    assert made.config.reward_model.overlong == "truncate_left"
    assert "reward_model.layout" in [change.key for change in made.changes]


def test_an_environment_has_room_for_all_of_its_turns() -> None:
    """And is played in rounds, which alone repeat a step to the bit."""
    environment = EnvironmentConfig(
        path="game.py", tools=("look",), max_turns=9, max_observation_tokens=16, retries=4
    )
    small, changed = shrunk(job(environment=environment), QWEN_7B)
    made = small.environment
    assert (made.path, made.tools, made.retries) == ("game.py", ("look",), 4)
    assert made.max_turns == 3 and made.max_turn_tokens == 8 and made.max_observation_tokens == 16
    needed = made.max_turns * made.max_turn_tokens + (made.max_turns - 1) * 64
    assert small.data.max_response_length >= needed
    assert made.rounds and "environment.rounds" in changed
    # Of 8 random tokens one ends the turn in 9 of 10 turns.
    assert 1 - (1 - len(small.rollout.stop_token_ids) / 320) ** 8 > 0.85
    # A token of the job's is several bytes, so fewer of them may be no limit of the miniature's.
    short = replace(job().data, max_response_length=20)
    small, _ = shrunk(job(environment=replace(environment, max_turns=2), data=short), QWEN_7B)
    assert small.data.max_response_length >= needed
    assert small.environment.max_turns == 2
    single, changed = shrunk(job(), QWEN_7B)
    assert single.rollout.stop_token_ids == () and single.data.max_response_length == 8
    assert "environment.rounds" not in changed


@pytest.mark.parametrize("update", ["between_batches", "in_flight"])
def test_generation_ahead_stays_ahead(update: Literal["between_batches", "in_flight"]) -> None:
    """By less than the steps of a miniature; in flight there are no rounds, and no exact resume."""
    rollout = replace(
        job().rollout, max_staleness=4, update=update, placement="disaggregated", sleep=False
    )
    correction = RolloutCorrectionConfig(bypass_mode=True)
    made = job(
        rollout=rollout,
        algorithm=AlgorithmConfig(rollout_correction=correction),
        environment=EnvironmentConfig(path="game.py"),
    )
    small, changed = shrunk(made, QWEN_7B)
    assert (small.rollout.max_staleness, small.rollout.update) == (1, update)
    assert small.rollout.placement == "disaggregated" and "rollout.max_staleness" in changed
    assert small.environment.rounds == repeats(small.rollout) == (update == "between_batches")


def test_a_profile_is_rehearsed_in_a_step_that_there_is() -> None:
    profiled, _ = shrunk(job(trainer=TrainerConfig(profile_steps=(3, 700))), QWEN_7B)
    assert profiled.trainer.profile_steps == (profiled.trainer.total_training_steps,)
    assert shrunk(job(), QWEN_7B)[0].trainer.profile_steps == ()


def test_nodes_are_kept_where_a_cluster_is_named() -> None:
    made = shrink_config(
        job(cluster=ClusterConfig(ray_address="head:6379", num_nodes=3)), QWEN_7B, 16
    )
    assert (made.config.cluster.ray_address, made.config.cluster.num_nodes) == ("head:6379", 3)
    made = shrink_config(job(cluster=ClusterConfig(num_nodes=3)), QWEN_7B, 16)
    assert made.config.cluster.num_nodes == 1 and "cluster.num_nodes" in [
        change.key for change in made.changes
    ]


@pytest.mark.parametrize("room", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("engine_ranks", [1, 2, 8])
def test_as_gpus_everything_has_a_device_of_the_actors_ranks(room: int, engine_ranks: int) -> None:
    """Critic and engines share them, and Ray is told of so many."""
    config = job(
        rollout=replace(job().rollout, tensor_parallel_size=engine_ranks),
        critic=CriticConfig(layout=LayoutConfig(tp=2, dp=4)),
    )
    shape = QWEN_7B | {"num_key_value_heads": 8, "num_attention_heads": 32}
    small = shrink_config(config, shape, room, as_gpu=True).config
    assert check(small) == [] and small.cluster.platform == "as_gpu"
    platform, rollout = choose_platform(small.cluster.platform), small.rollout
    placement = place(
        platform, worker_groups(small), rollout.engines, rollout.tensor_parallel_size, True, 1
    )
    devices = parallel_layout(small.actor.layout).world_size
    assert platform.pretended_devices(placement.gpus) == devices and platform.kind == "cpu"
    assert rollout.engines * rollout.tensor_parallel_size <= devices == len(placement.bundles)
    assert platform.one_device_a_rank
