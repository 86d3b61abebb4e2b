"""How a run is set up, as its page needs it: from `config.yaml` in its folder.

Invariant: nothing of the user's is executed, and a file that cannot be used is no error here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf3d.checkpoints.store import CONFIG_FILE
from rlhf3d.config.derived import actor_batching, critic_batching, derive
from rlhf3d.config.load import load_config
from rlhf3d.config.schema import AlgorithmConfig, CustomRewardConfig, RewardConfig, RolloutConfig
from rlhf3d.observability.page.setup import Setup
from rlhf3d.units import counted

PLATFORMS = {"cpu": "CPU", "as_gpu": "CPU", "cuda": "GPU"}


def find_setup(run: Path) -> Setup | None:
    """The setup of the run in a folder; None where its configuration does not say it."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return setup_of(path)
    except ValueError:
        return None


def setup_of(path: Path) -> Setup:
    """The setup that a configuration makes. ValueError where it cannot be used."""
    config = load_config(path)
    actor, rollout, algorithm, reward = (
        config.actor,
        config.rollout,
        config.algorithm,
        config.reward,
    )
    needs = algorithm.needs if algorithm.is_resolved else None
    batching = actor_batching(actor)
    epochs = [batching.epochs]
    # What a user's own estimator needs, and so what runs, is known only when its file is run.
    groups = has_critic = micro_batches = ranks = None
    if needs is not None:
        groups, has_critic = needs.groups, needs.values
        derived = derive(config)
        micro_batches, ranks = derived.actor.micro_batches_per_rank, derived.world_size
    if has_critic:
        epochs.append(critic_batching(actor, config.critic).epochs)
    on_cpu = PLATFORMS.get(config.cluster.platform) == "CPU"
    about = [
        _algorithm(algorithm, actor.policy_loss),
        f"{Path(config.model.path).name} {config.model.dtype}",
        _files(config.data.train_files),
        f"{config.data.train_batch_size} prompts × {rollout.n}",
        _ages(rollout),
        PLATFORMS.get(config.cluster.platform, ""),
        "" if ranks is None else counted(ranks, "training rank"),
    ]
    return Setup(
        about=", ".join(part for part in about if part),
        scoring=_scoring(reward, config.custom_reward_function, config.reward_model.path),
        needs_groups=groups,
        old_from_engine=algorithm.rollout_correction.bypass_mode,
        max_staleness=rollout.max_staleness,
        on_cpu=on_cpu,
        epochs=max(epochs),
        mini_batches=max(1, config.data.train_batch_size // batching.mini_batch_size),
        kl_term=config.needs_reference,
        dynamic_sampling=algorithm.filter_groups.enable,
        micro_batches=micro_batches,
        stages=actor.layout.pp,
        stage_parts=actor.layout.vpp or 1,
        packed=config.model.use_remove_padding,
        decoded_at_once=rollout.engines * rollout.max_num_seqs,
        completions_per_prompt=rollout.n,
        sequences=config.data.train_batch_size * rollout.n,
        response_limit=config.data.max_response_length,
        overlong_penalty=reward.overlong_buffer.enable,
        scores_last_number=_has_rule(reward, config.custom_reward_function)
        and reward.method == "flexible",
        custom_reward=config.custom_reward_function.path is not None,
        reward_workers=reward.workers,
        test_freq=config.trainer.test_freq,
        save_freq=config.trainer.save_freq,
        async_save=config.trainer.async_save,
    )


def _algorithm(algorithm: AlgorithmConfig, policy_loss: str) -> str:
    estimator = algorithm.adv_estimator
    name = "PPO (gae)" if estimator == "gae" else estimator
    return name if policy_loss == "vanilla" else f"{name} with {policy_loss} loss"


def _files(files: Sequence[str]) -> str:
    if not files:
        return ""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return "/".join(Path(files[0]).parts[-2:]) + more


def _ages(rollout: RolloutConfig) -> str:
    if not rollout.max_staleness:
        return "not asynchronous"
    return f"asynchronous (staleness up to {rollout.max_staleness})"


def _has_rule(reward: RewardConfig, custom: CustomRewardConfig) -> bool:
    """Whether a rule of ours finds the answer in the text."""
    return custom.path is None and bool(reward.weights.get("accuracy"))


def _scoring(reward: RewardConfig, custom: CustomRewardConfig, model: str | None) -> str:
    how = {
        "strict": "strict: the answer stands after `####` or in a box",
        "flexible": "flexible: after `####` or in a box, else the last number or expression",
    }
    rule = f"the rule of the row's data source (reward.method {how[reward.method]})"
    meanings = {
        "accuracy": rule if custom.path is None else f"`{custom.name}` in {custom.path}",
        "format": f"the form {reward.format}",
        "reward_model": f"the reward model {model}",
        "environment": "what the environment gives for turns",
    }
    parts = [
        meanings.get(part, part) if weight == 1 else f"{weight:g} × {meanings.get(part, part)}"
        for part, weight in reward.weights.items()
        if weight
    ]
    penalty = "; minus a penalty for long answers" if reward.overlong_buffer.enable else ""
    return f"The score is {' + '.join(parts)}{penalty}."
