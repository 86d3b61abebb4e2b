"""A job in miniature: the same families, layouts and batch arithmetic, with small numbers.

Invariant: heads, layers, experts and vocabulary of the miniature leave the remainders that the
job's leave when the layouts divide them, so that what fits, fits for the same reasons. What could
not be kept is a `Change` with its reason. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm, prod
from typing import Any

from rlhf3d.config.derived import critic_batching
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import (
    AlgorithmConfig,
    ClusterConfig,
    Config,
    CriticConfig,
    DataConfig,
    LayoutConfig,
    OptimConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    TrainerConfig,
)
from rlhf3d.models.spec import FAMILIES, parse_config
from rlhf3d.parallel.layout import PlatformKind

HEAD_DIM = 32
"""The smallest head that vLLM's attention on CPU takes."""
VOCAB = 320
"""Ids at least: all bytes, and special tokens."""
PROMPT_TOKENS, RESPONSE_TOKENS = 96, 8
AS_GPU_PROMPT_TOKENS = 192
"""Of bytes: the beginning that a chat template gives all prompts is longer than a block of the
prefix cache, as on GPUs."""
TURNS, TURN_TOKENS, OBSERVATION_TOKENS = 3, 8, 64
"""Of trajectories with an environment; its prompts keep ENVIRONMENT_PROMPT_TOKENS."""
ENVIRONMENT_PROMPT_TOKENS = 2048
"""Of bytes: definitions of tools, which a cut would make another prompt of."""
TEMPLATE_TOKENS = 64
"""What a chat template writes between two turns, in bytes."""
ENDS_TURN = tuple(range(4, VOCAB, 4))
"""Tokens that end a turn: of random weights hardly any would end by itself, and a turn that is cut
off ends its trajectory."""
MAX_RANKS = 16
"""Most training processes, unless the user says otherwise."""
ENGINE_RANKS = 4
"""Most vLLM processes, which need about 2 GB each."""
STEPS = 2


@dataclass(frozen=True)
class Change:
    """Something besides size in which the miniature differs from the job."""

    key: str
    was: object
    is_now: object
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.was} -> {self.is_now} ({self.reason})"


class Changes(list[Change]):
    """All of them, in the order made."""

    def note(self, key: str, was: object, is_now: object, reason: str) -> None:
        """Add a change, if it is one."""
        if was != is_now:
            self.append(Change(key, was, is_now, reason))

    def note_layout(
        self, section: str, was: LayoutConfig | None, is_now: LayoutConfig, room: int
    ) -> None:
        """Add a layout, by its sizes, that had to be cut to `room` ranks."""
        grids = [str(parallel_layout(layout)) for layout in (was, is_now) if layout is not None]
        self.note(f"{section}.layout", grids[0], grids[-1], f"at most {room} training ranks")


@dataclass(frozen=True)
class Shrunk:
    """A miniature job. Paths (models, data, output) are left for the caller."""

    config: Config
    model: dict[str, Any]
    """`config.json` of its model."""
    reward: dict[str, Any] | None
    """And of its reward model."""
    changes: list[Change]


def cut_layout(layout: LayoutConfig, room: int, layers: int) -> LayoutConfig:
    """Return the layout on at most `room` ranks.

    Replicas go first, then context ranks, stages and tensor ranks; what is more than one stays so
    as long as there is room.
    """
    sizes = {"dp": layout.dp, "cp": layout.cp, "pp": layout.pp, "tp": layout.tp}
    for least in (2, 1):
        for axis in sizes:
            while prod(sizes.values()) > room and _divided(sizes[axis]) >= least:
                sizes[axis] = _divided(sizes[axis])
    cut = replace(layout, dp=sizes["dp"], cp=sizes["cp"], pp=sizes["pp"], tp=sizes["tp"])
    if cut == layout:
        return layout
    cut = replace(
        cut,
        # The ranks of a stage share out into groups of ep.
        ep=gcd(cut.ep, cut.tp * cut.cp * cut.dp),
        sequence_parallel=cut.sequence_parallel and cut.tp > 1,
    )
    if cut.pp == 1:  # a single stage has nothing to interleave
        cut = replace(cut, vpp=None)
    uneven = len(set(parallel_layout(layout).stage_layers(layers) or ())) > 1
    if cut.pp == 1 or not uneven:
        cut = replace(cut, first_stage_layers=None, last_stage_layers=None)
    return cut


def _divided(size: int) -> int:
    """The size divided by its smallest factor; 0 for 1."""
    for factor in range(2, size + 1):
        if size % factor == 0:
            return size // factor
    return 0


def shrink_layout(layout: LayoutConfig, layers: int) -> tuple[LayoutConfig, int]:
    """Return the layout over as few layers as keep its shape, and the number of those.

    One a chunk, and where stages are uneven two in those that have more than the smallest.
    """
    grid = parallel_layout(layout)
    stages = grid.stage_layers(layers)
    assert stages is not None, f"{layers} layers do not divide into {grid}"
    small = [grid.vpp * (1 + (size > min(stages))) for size in stages]
    first, last = layout.first_stage_layers, layout.last_stage_layers
    shrunk = layout
    if first is not None:
        shrunk = replace(shrunk, first_stage_layers=small[0])
    if last is not None:
        shrunk = replace(shrunk, last_stage_layers=small[-1])
    return shrunk, sum(small)


def shrink_model(
    config: Mapping[str, Any], tensor_parallel: Sequence[int], expert_parallel: int, layers: int
) -> dict:
    """Return the miniature's `config.json`, for the tensor-parallel sizes of training and of vLLM.

    Heads, KV heads and the vocabulary keep their remainders by each of the sizes; queries a KV head
    stay.
    """
    spec = parse_config(dict(config), "the model's config.json")
    modulus = lcm(*tensor_parallel)
    # From 1 on: the smallest number that divides, or fails to, as the job's does.
    kv_heads = _congruent(1, spec.num_kv_heads, modulus)
    heads = kv_heads * (spec.num_heads // spec.num_kv_heads)
    small: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": _congruent(2 * HEAD_DIM, spec.ffn_size, modulus),
        "vocab_size": _congruent(VOCAB, spec.vocab_size, modulus),
        "max_position_embeddings": min(spec.max_position, 4096),
    }
    if (keys := FAMILIES[spec.family].experts) is not None:
        # Enough for every rank to hold two, and for the router to choose among.
        wanted = max(2 * expert_parallel, spec.experts_per_token + 1)
        experts = min(spec.num_experts, _congruent(wanted, spec.num_experts, expert_parallel))
        small |= {key: experts for key in keys.num_experts if config.get(key) is not None}
        small[keys.ffn_size] = _congruent(2 * HEAD_DIM, spec.moe_ffn_size, modulus)
    if (windows := config.get("layer_types")) is not None:
        small["layer_types"] = list(windows)[:layers]
    return {**config, **small}


def _congruent(least: int, value: int, modulus: int) -> int:
    """The smallest number from `least` on that has the remainder of `value`."""
    return least + (value - least) % modulus


def shrink_config(
    config: Config,
    model: Mapping[str, Any],
    room: int,
    reward: Mapping[str, Any] | None = None,
    as_gpu: bool = False,
) -> Shrunk:
    """Return the miniature job on at most `room` training ranks.

    `model` and `reward` are the `config.json` of the job's model and reward model. With `as_gpu`
    each rank of the actor has a device that other groups and engines share.
    """
    spec = parse_config(dict(model), config.model.path)
    changes = Changes()
    with_critic = config.critic.layout is not None and config.needs_critic
    groups = with_critic + (reward is not None)
    # The actor gets two shares of the room, and every other group one.
    own_room = max(1, room // (2 + groups))  # of each group beside the actor's
    actor = cut_layout(config.actor.layout, room - groups * own_room, spec.num_layers)
    devices = parallel_layout(actor).world_size
    # Colocated groups have no more ranks than the actor, whose devices they share.
    if as_gpu:
        own_room = min(own_room, devices)
    changes.note_layout("actor", config.actor.layout, actor, room)
    critic = config.critic.layout
    if critic is not None and with_critic:
        critic = cut_layout(critic, own_room, spec.num_layers)
        changes.note_layout("critic", config.critic.layout, critic, room)
    reward_model, small_reward = config.reward_model, None
    if reward is not None:
        reward_model, small_reward = _shrink_reward(reward_model, reward, own_room)
        changes.note_layout("reward_model", config.reward_model.layout, reward_model.layout, room)
    share_devices = as_gpu and config.rollout.placement == "colocated"
    most_engines = min(ENGINE_RANKS, devices) if share_devices else ENGINE_RANKS
    rollout = _shrink_rollout(config.rollout, most_engines, changes)
    if config.environment.enabled:
        rollout = replace(rollout, stop_token_ids=ENDS_TURN)
        key, stops = "rollout.stop_token_ids", list(config.rollout.stop_token_ids)
        changes.note(key, stops, f"every fourth, {ENDS_TURN[0]} to {ENDS_TURN[-1]}", "so turns end")

    actor, layers = shrink_layout(actor, spec.num_layers)
    layouts = [actor]
    if critic is not None:
        critic, critic_layers = shrink_layout(critic, spec.num_layers)
        # Actor and critic are one shape, whose layers both layouts have to cut.
        layers = lcm(layers, critic_layers)
        layouts.append(critic)
    tensor_parallel = [rollout.tensor_parallel_size, *(layout.tp for layout in layouts)]
    most_expert_parallel = max(layout.ep for layout in layouts)
    small_model = shrink_model(model, tensor_parallel, most_expert_parallel, layers)
    mini = {
        "actor": config.actor.ppo_mini_batch_size,
        "critic": critic_batching(config.actor, config.critic).mini_batch_size,
    }
    batches = _batches(config.data.train_batch_size, mini, layouts)
    data = _shrink_data(config.data, config.environment.enabled, batches["train"], as_gpu)
    longest = data.max_prompt_length + data.max_response_length
    small = replace(
        config,
        data=data,
        actor=replace(
            config.actor,
            layout=actor,
            optim=_early(config.actor.optim),
            ppo_mini_batch_size=batches["actor"],
            ppo_micro_batch_size_per_gpu=1,
            ppo_max_token_len_per_gpu=2 * longest,
        ),
        critic=_shrink_critic(config.critic, critic, batches["critic"]),
        rollout=rollout,
        algorithm=_shrink_algorithm(config.algorithm, changes),
        reward=_shrink_scoring(config.reward),
        trainer=_shrink_trainer(config.trainer),
        reward_model=reward_model,
        environment=_shrink_environment(config.environment, repeats(config.rollout), changes),
        cluster=_shrink_cluster(config.cluster, as_gpu, changes),
    )
    return Shrunk(small, small_model, small_reward, changes)


def _shrink_rollout(rollout: RolloutConfig, most: int, changes: Changes) -> RolloutConfig:
    """At most two engines, on at most `most` processes."""
    tensor_parallel_size = rollout.tensor_parallel_size
    # By its factors, so that what it divides (heads, experts) stays divided.
    while tensor_parallel_size > most:
        tensor_parallel_size = _divided(tensor_parallel_size)
    engines = max(1, min(rollout.engines, 2, most // tensor_parallel_size))
    reason = f"at most {most} vLLM processes"
    changes.note("rollout.engines", rollout.engines, engines, reason)
    changes.note(
        "rollout.tensor_parallel_size", rollout.tensor_parallel_size, tensor_parallel_size, reason
    )
    # With more, two steps would be written by the first weights alone.
    staleness, reason = min(rollout.max_staleness, STEPS - 1), f"there are {STEPS} steps"
    changes.note("rollout.max_staleness", rollout.max_staleness, staleness, reason)
    return replace(
        rollout,
        n=min(rollout.n, 2),
        max_staleness=staleness,
        engines=engines,
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=16,
        kv_cache_gib=0.1,
        threads=1,
        enforce_eager=True,
        stop_token_ids=(),  # they are of another vocabulary
    )


def _shrink_data(
    data: DataConfig, has_environment: bool, train_batch_size: int, as_gpu: bool
) -> DataConfig:
    prompt_tokens = min(data.max_prompt_length, AS_GPU_PROMPT_TOKENS if as_gpu else PROMPT_TOKENS)
    response_tokens = min(data.max_response_length, RESPONSE_TOKENS)
    if has_environment:
        # A token of the job's is several bytes.
        prompt_tokens = ENVIRONMENT_PROMPT_TOKENS
        between = OBSERVATION_TOKENS + TEMPLATE_TOKENS
        response_tokens = TURNS * TURN_TOKENS + (TURNS - 1) * between
    return replace(
        data,
        train_batch_size=train_batch_size,
        gen_batch_size=None,
        max_prompt_length=prompt_tokens,
        max_response_length=response_tokens,
        # As on GPUs prompts begin alike, for the prefix cache: their beginning is kept.
        overlong_prompts="truncate_right" if as_gpu else "truncate_left",
        val_max_samples=2,
    )


def repeats(rollout: RolloutConfig) -> bool:
    """Whether a resumed run repeats a step to the bit.

    In flight it does not: which weights write which token depends on when they come.
    """
    return rollout.update != "in_flight"


def _shrink_environment(
    environment: EnvironmentConfig, exact: bool, changes: Changes
) -> EnvironmentConfig:
    """A few short turns; its deadlines, retries and allowed share of errors stay.

    `exact`: the resumed run must repeat a step to the bit.
    """
    if not environment.enabled:
        return environment
    if exact:
        reason = "the resumed run must repeat a step to the bit"
        changes.note("environment.rounds", environment.rounds, True, reason)
    key, action = "environment.overlong_observations", environment.overlong_observations
    changes.note(key, action, "truncate", "observations are bytes, and cut early")
    turn = min(environment.max_turn_tokens or TURN_TOKENS, TURN_TOKENS)
    observation = environment.max_observation_tokens or OBSERVATION_TOKENS
    return replace(
        environment,
        max_turns=min(environment.max_turns, TURNS),
        max_turn_tokens=turn,
        max_observation_tokens=min(observation, OBSERVATION_TOKENS),
        overlong_observations="truncate",
        rounds=exact,
    )


def _shrink_critic(
    critic: CriticConfig, layout: LayoutConfig | None, mini_batch_size: int
) -> CriticConfig:
    """What the critic takes from the actor, it still does."""
    small = replace(
        critic, layout=layout, optim=_early(critic.optim), ppo_max_token_len_per_gpu=None
    )
    if critic.ppo_mini_batch_size is not None:
        small = replace(small, ppo_mini_batch_size=mini_batch_size)
    if critic.ppo_micro_batch_size_per_gpu is not None:
        small = replace(small, ppo_micro_batch_size_per_gpu=1)
    return small


def _shrink_algorithm(algorithm: AlgorithmConfig, changes: Changes) -> AlgorithmConfig:
    key, reason = "algorithm.filter_groups.enable", "completions of random weights score alike"
    changes.note(key, algorithm.filter_groups.enable, False, reason)
    return replace(algorithm, filter_groups=replace(algorithm.filter_groups, enable=False))


def _shrink_scoring(reward: RewardConfig) -> RewardConfig:
    overlong = replace(reward.overlong_buffer, len=min(4, reward.overlong_buffer.len))
    return replace(reward, workers=1, overlong_buffer=overlong)


def _shrink_trainer(trainer: TrainerConfig) -> TrainerConfig:
    return replace(
        trainer,
        total_training_steps=STEPS,
        critic_warmup=min(trainer.critic_warmup, 1),
        # A miniature is no run of the project's.
        logger=("tensorboard",),
        test_freq=0,
        save_freq=1,
        save_at_end=True,
        save_optimizer=True,
        profile_steps=(STEPS,) if trainer.profile_steps else (),
        max_wall_clock_s=None,
    )


def _shrink_cluster(cluster: ClusterConfig, as_gpu: bool, changes: Changes) -> ClusterConfig:
    nodes = 1 if cluster.ray_address is None else cluster.num_nodes
    platform: PlatformKind = "as_gpu" if as_gpu else "cpu"
    reason = "cluster.ray_address names no cluster"
    changes.note("cluster.num_nodes", cluster.num_nodes, nodes, reason)
    changes.note("cluster.platform", cluster.platform, platform, "without GPUs")
    return replace(cluster, platform=platform, num_nodes=nodes, threads_per_rank=1)


def _shrink_reward(
    settings: RewardModelConfig, shape: Mapping[str, Any], room: int
) -> tuple[RewardModelConfig, dict[str, Any]]:
    """The section of the reward model, its path left as it is, and its `config.json`."""
    spec = parse_config(dict(shape), str(settings.path))
    layout, layers = shrink_layout(
        cut_layout(settings.layout, room, spec.num_layers), spec.num_layers
    )
    small = replace(
        settings,
        layout=layout,
        micro_batch_size_per_gpu=min(settings.micro_batch_size_per_gpu, 2),
        max_length=min(settings.max_length or spec.max_position, PROMPT_TOKENS + RESPONSE_TOKENS),
        overlong="truncate_left",
    )
    return small, {**shrink_model(shape, [layout.tp], layout.ep, layers), "num_labels": 1}


def _batches(
    train_batch_size: int, mini: Mapping[str, int], layouts: Sequence[LayoutConfig]
) -> dict[str, int]:
    """Prompts of a step ("train") and of each model's mini-batch, for those of the job.

    A data-parallel rank gets two sequences a mini-batch, or a round of an interleaved pipeline; a
    step has as many mini-batches as the job's, at most two.
    """
    replicas = lcm(*(layout.dp for layout in layouts))
    interleaved = [layout.pp for layout in layouts if layout.vpp is not None and layout.vpp > 1]
    # At least two sequences for each replica, and complete rounds of interleaved stages.
    prompts = replicas * lcm(2, *interleaved)
    steps = {role: min(2, max(1, train_batch_size // mini[role])) for role in mini}
    # Mini-batches of both models divide it.
    train = prompts * lcm(*steps.values())
    return {"train": train, **{role: train // count for role, count in steps.items()}}


def _early(optim: OptimConfig) -> OptimConfig:
    """At its full learning rate by the second step."""
    return replace(optim, lr_warmup_steps=min(optim.lr_warmup_steps, STEPS - 1))
