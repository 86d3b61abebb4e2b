"""The counts of a run, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf3d.algorithms.names import ADVANTAGE_ESTIMATORS
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.derived import clip_range, derive, old_logprobs_from, width_multiples
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    ClusterConfig,
    Config,
    CriticConfig,
    DataConfig,
    FilterGroupsConfig,
    LayoutConfig,
    ModelConfig,
    RolloutConfig,
    RolloutCorrectionConfig,
    TrainerConfig,
)
from rlhf3d.config.summary import summary_lines
from rlhf3d.parallel.layout import ParallelLayout

CONFIG = Config(
    data=DataConfig(train_batch_size=48, max_prompt_length=100, max_response_length=28),
    actor=ActorConfig(
        layout=LayoutConfig(tp=3, pp=2, dp=4, vpp=2),
        ppo_mini_batch_size=16,
        ppo_micro_batch_size_per_gpu=2,
        ppo_epochs=2,
    ),
    critic=CriticConfig(ppo_mini_batch_size=48, ppo_micro_batch_size_per_gpu=5),
    rollout=RolloutConfig(n=5, engines=3, tensor_parallel_size=2),
)


def test_layout_is_passed_on_whole() -> None:
    layout = LayoutConfig(tp=2, pp=3, dp=4, vpp=2, ep=8, first_stage_layers=2, last_stage_layers=4)
    derived = derive(replace(CONFIG, actor=replace(CONFIG.actor, layout=layout)))
    assert derived.layout == ParallelLayout(2, 3, 4, 2, 8, 2, 4)
    assert derived.world_size == derived.layout.world_size == 24


def test_counts_by_hand() -> None:
    derived = derive(CONFIG)
    assert (derived.world_size, derived.engine_ranks) == (24, 6)
    assert (derived.layout.tp, derived.layout.vpp) == (3, 2)
    assert derived.sequences_per_step == 240
    assert derived.max_sequence_length == 128
    actor = derived.actor
    assert (actor.mini_batches, actor.sequences_per_mini_batch) == (3, 80)
    assert (actor.micro_batches_per_rank, actor.optimizer_steps_per_step) == (10, 6)
    assert derived.critic is not None
    assert (derived.critic.mini_batches, derived.critic.micro_batches_per_rank) == (1, 12)
    assert derived.critic.optimizer_steps_per_step == 2, (
        "epochs are the actor's where none are given"
    )


def test_micro_batches_of_the_critic_are_the_actors_unless_given() -> None:
    layout = LayoutConfig(tp=2, sequence_parallel=True)
    actor = ActorConfig(layout=layout, use_dynamic_bsz=True, ppo_max_token_len_per_gpu=4096)
    config = Config(actor=actor, model=ModelConfig(use_remove_padding=True))
    derived = derive(config)
    assert derived.critic is not None
    assert (
        derived.actor.micro_batching
        == derived.critic.micro_batching
        == MicroBatching(4, 4096, True, 2)
    )
    assert derived.actor.micro_batches_per_rank is None
    assert "micro-batches of at most 4096 tokens, packed" in "\n".join(
        summary_lines(config, derived)
    )
    budget = derive(replace(config, critic=CriticConfig(ppo_max_token_len_per_gpu=8192))).critic
    fixed = derive(
        replace(config, critic=CriticConfig(use_dynamic_bsz=False, ppo_micro_batch_size_per_gpu=8))
    ).critic
    assert budget is not None and budget.micro_batching == MicroBatching(4, 8192, True, 2)
    assert fixed is not None and fixed.micro_batching == MicroBatching(8, None, True, 2)
    assert fixed.micro_batches_per_rank == 8


def test_widths_divide_by_what_shares_out_a_sequence() -> None:
    def widths(**layout: Any) -> tuple[int, int]:
        rule = derive(Config(actor=ActorConfig(layout=LayoutConfig(**layout)))).actor.micro_batching
        return rule.multiple_of, rule.row_multiple_of

    assert widths(tp=2, cp=1) == (1, 1)
    assert widths(cp=2) == (4, 4)
    assert widths(tp=2, cp=3, sequence_parallel=True) == (12, 6)


def test_gpus_get_few_widths() -> None:
    """Multiples of 128, rows of a packed micro-batch apart.

    The plan, the engine and the budget's check agree.
    """

    def rule(**layout: Any) -> MicroBatching:
        actor = ActorConfig(layout=LayoutConfig(**layout))
        return derive(
            replace(Config(actor=actor), cluster=ClusterConfig(platform="cuda"))
        ).actor.micro_batching

    assert (rule().multiple_of, rule().row_multiple_of) == (128, 1)
    context = rule(tp=2, cp=3, sequence_parallel=True)
    assert (context.multiple_of, context.row_multiple_of) == (384, 6)
    assert width_multiples(LayoutConfig(cp=2), "cuda") == {"multiple_of": 128, "row_multiple_of": 4}
    assert [rule().width(tokens) for tokens in (1, 128, 129)] == [128, 128, 256]


def test_prefixes_are_shared_where_attention_can() -> None:
    def shares(platform: Any, value: Any = "auto", **layout: Any) -> bool:
        actor = ActorConfig(layout=LayoutConfig(**layout))
        config = Config(
            model=ModelConfig(share_prefixes=value),
            actor=actor,
            cluster=ClusterConfig(platform=platform),
        )
        return derive(config).actor.micro_batching.share_prefixes

    assert shares("cpu") and shares("cpu", True, tp=2, pp=2)
    assert not shares("cpu", False) and not shares("cpu", cp=2) and not shares("cuda")


def test_a_critic_with_a_layout_of_its_own() -> None:
    """240 sequences over 6 ranks are 40; the actor's group keeps its 24 ranks."""
    own = replace(CONFIG.critic, layout=LayoutConfig(tp=2, dp=6, sequence_parallel=True))
    config = replace(CONFIG, critic=own, algorithm=AlgorithmConfig(use_kl_in_reward=True))
    derived = derive(config)
    assert [(g.name, g.roles) for g in derived.groups] == [
        ("actor", ("actor", "ref")),
        ("critic", ("critic",)),
    ]
    assert derived.world_size == 24 + 12 and derived.layout.world_size == 24
    assert derived.devices == 24  # the critic's ranks are on the actor's GPUs
    assert derived.critic is not None and derived.critic.micro_batching.multiple_of == 2
    assert derived.critic.micro_batches_per_rank == 8
    assert derived.actor == derive(CONFIG).actor
    text = "\n".join(summary_lines(config, derived))
    assert "actor group (actor, reference): TP3×PP2×DP4×VPP2 = 24 ranks" in text
    assert "critic group (critic): TP2×PP1×DP6 = 12 ranks, sequence_parallel" in text
    without = replace(config, algorithm=AlgorithmConfig(adv_estimator="grpo"))
    assert [group.roles for group in derive(without).groups] == [("actor",)]


def test_no_critic_without_values() -> None:
    assert derive(replace(CONFIG, algorithm=AlgorithmConfig(adv_estimator="grpo"))).critic is None


def test_total_steps() -> None:
    assert derive(CONFIG).total_steps is None
    epochs = replace(CONFIG, trainer=TrainerConfig(total_epochs=3))
    assert derive(epochs, train_rows=100).total_steps == 6, "an epoch is 100 // 48 batches"
    steps = replace(CONFIG, trainer=TrainerConfig(total_training_steps=7))
    assert derive(steps, train_rows=100).total_steps == 7
    with pytest.raises(
        ValueError, match=r"hold 47 usable prompts, fewer than data.train_batch_size = 48"
    ):
        derive(CONFIG, train_rows=47)


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"name": "Game"}, ["at most 4", "game.py (Game);", "9 environments"]),
        ({"tools": ("look", "say")}, ["(tools alone", "tools look, say;"]),
        ({"rounds": True}, ["that of each row", "in rounds"]),
    ],
)
def test_summary_shows_who_answers(environment: dict[str, Any], shown: list[str]) -> None:
    made = EnvironmentConfig("game.py", max_turns=4, max_concurrent=9, **environment)
    lines = summary_lines(replace(CONFIG, environment=made), derive(CONFIG))
    (line,) = [line for line in lines if line.startswith("turns")]
    assert all(text in line for text in shown), line
    assert not [line for line in summary_lines(CONFIG, derive(CONFIG)) if "turns" in line]


def test_summary_shows_the_counts() -> None:
    text = "\n".join(summary_lines(CONFIG, derive(CONFIG)))
    for piece in (
        "TP3×PP2×DP4×VPP2 = 24 ranks",
        "48 prompts x 5 completions = 240 sequences",
        "3 mini-batches of 80 sequences = 6 optimizer steps",
        "10 micro-batches of 2",
        "never (data.val_files is empty)",
    ):
        assert piece in text


def stale_lines(**rollout: Any) -> dict[str, str]:
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, **rollout))
    labels = ("staleness", "old_policy", "ahead")
    lines = (line.split(maxsplit=1) for line in summary_lines(config, derive(config)))
    return {label: text for label, text in lines if label in labels}


def test_summary_says_how_old_a_token_may_be() -> None:
    """240 sequences and 3 x 2 optimizer steps a batch; 3 engines of 64 sequences."""
    assert stale_lines() == {}
    between = stale_lines(max_staleness=2)
    assert "up to 2 batch(es) ahead, new weights between two batches" in between["staleness"]
    assert "2 versions = 2 x 6 = 12 optimizer steps old" in between["staleness"]
    assert between["staleness"].endswith("within a batch up to 5 more")
    assert "at most 720 sequences" in between["ahead"] and "have 240" in between["ahead"]
    flying = stale_lines(max_staleness=1, update="in_flight")
    assert "between two steps of an engine" in flying["staleness"]
    assert "at most 480 sequences" in flying["ahead"] and "decode 192 at once" in flying["ahead"]
    assert "wait" in flying["ahead"]
    roomy = stale_lines(max_staleness=1, update="in_flight", max_num_seqs=160)
    assert "decode 480 at once" in roomy["ahead"] and "wait" not in roomy["ahead"]


def test_summary_says_what_the_old_policy_is() -> None:
    rollout = replace(CONFIG.rollout, max_staleness=1)

    def old_policy(**correction: Any) -> str:
        algorithm = AlgorithmConfig(rollout_correction=RolloutCorrectionConfig(**correction))
        config = replace(CONFIG, rollout=rollout, algorithm=algorithm)
        lines = summary_lines(config, derive(config))
        return next(line for line in lines if line.startswith("old_policy"))

    assert "the engine's log-probs" in old_policy(bypass_mode=True)
    assert "recomputed" in old_policy(rollout_is="token")


def test_one_optimizer_step_a_batch_adds_nothing_within_it() -> None:
    actor = replace(CONFIG.actor, ppo_mini_batch_size=48, ppo_epochs=1)
    config = replace(CONFIG, actor=actor, rollout=replace(CONFIG.rollout, max_staleness=3))
    derived = derive(config)
    assert (derived.open_sequences, derived.stale_optimizer_steps) == (960, 3)
    lines = summary_lines(config, derived)
    (line,) = [line for line in lines if line.startswith("staleness")]
    assert line.endswith("3 x 1 = 3 optimizer steps old")


ONE_STEP = replace(CONFIG, actor=replace(CONFIG.actor, ppo_mini_batch_size=48, ppo_epochs=1))


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_one_optimizer_step_a_batch_takes_the_old_logprobs_from_its_own_pass(
    estimator: str,
) -> None:
    """Whatever the estimator, and with dynamic sampling, environments and KL in the loss too."""
    algorithm = AlgorithmConfig(
        adv_estimator=estimator, filter_groups=FilterGroupsConfig(enable=True)
    )
    own = replace(
        ONE_STEP,
        algorithm=algorithm,
        actor=replace(ONE_STEP.actor, use_kl_loss=True),
        environment=EnvironmentConfig("game.py"),
    )
    assert derive(own).old_logprobs_from == "update"
    for actor in (replace(own.actor, ppo_epochs=2), replace(own.actor, ppo_mini_batch_size=24)):
        assert derive(replace(own, actor=actor)).old_logprobs_from == "phase"


@pytest.mark.parametrize(
    "needs",
    [
        {"use_kl_in_reward": True},
        {"rollout_correction": RolloutCorrectionConfig(rollout_is="token")},
        {
            "rollout_correction": RolloutCorrectionConfig(
                rollout_rs="token_k1", rollout_rs_threshold=2.0
            )
        },
    ],
)
def test_what_needs_the_old_logprobs_before_the_update_has_their_phase(
    needs: dict[str, Any],
) -> None:
    assert old_logprobs_from(AlgorithmConfig(), 1, 0) == "update"
    assert old_logprobs_from(AlgorithmConfig(**needs), 1, 0) == "phase"


def test_old_logprobs_while_the_critic_warms_up_and_in_bypass_mode() -> None:
    assert old_logprobs_from(AlgorithmConfig(), 1, critic_warmup=1) == "phase"
    bypass = AlgorithmConfig(rollout_correction=RolloutCorrectionConfig(bypass_mode=True))
    assert {old_logprobs_from(bypass, steps, steps - 1) for steps in (1, 2)} == {"engine"}


def test_dedicated_engines_and_critics_have_devices_of_their_own() -> None:
    own = replace(CONFIG.critic, layout=LayoutConfig(tp=2, dp=6), placement="disaggregated")
    engines = replace(CONFIG.rollout, engines=3, tensor_parallel_size=2, placement="disaggregated")
    assert derive(replace(CONFIG, critic=own, rollout=engines)).devices == 24 + 12 + 6


def test_gspo_by_tokens_is_warned_about() -> None:
    def warnings(mode: str) -> list[str]:
        config = replace(
            CONFIG, actor=replace(CONFIG.actor, policy_loss="gspo", loss_agg_mode=mode)
        )
        return [
            line for line in summary_lines(config, derive(config)) if line.startswith("warning")
        ]

    assert warnings("seq-mean-token-mean") == []
    (line,) = warnings("token-mean")
    assert "actor.loss_agg_mode = token-mean" in line and "seq-mean-token-mean" in line


def test_a_batch_has_room_for_all_of_its_columns() -> None:
    import torch

    from rlhf3d.batching.batch import from_sequences

    derived = derive(CONFIG)
    rows = derived.sequences_per_step
    batch = from_sequences([[1] * 100] * rows, [[2] * 28] * rows, pad_id=0)
    wide = batch.with_columns(**{f"column_{i}": torch.zeros(rows, 28) for i in range(8)})
    size = sum(column.nbytes for column in wide.columns.values())
    assert size <= derived.batch_bytes < 5 * size


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(None, None, (0.2, 0.2)), (None, 0.28, (0.2, 0.28)), (0.0, None, (0.0, 0.2))],
)
def test_clip_range_defaults_to_clip_ratio(
    low: float | None, high: float | None, expected: tuple[float, float]
) -> None:
    assert clip_range(ActorConfig(clip_ratio_low=low, clip_ratio_high=high)) == expected
