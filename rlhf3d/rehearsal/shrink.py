"""A job in miniature: the same families, divisibilities, layouts and batch arithmetic, with small numbers.

Invariant: heads, layers, experts and vocabulary of the miniature leave the remainders that the job's leave when the
layouts divide them, so that what fits fits for the same reasons. What could not be kept is a `Change` with its reason.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm, prod
from typing import Any

from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import Config, LayoutConfig, OptimConfig, RewardModelConfig
from rlhf3d.models.spec import FAMILIES, parse_config
from rlhf3d.parallel.layout import ParallelLayout, PlatformKind

HEAD_DIM = 32
"""The smallest head that vLLM's attention on CPU takes."""
VOCAB = 320
"""At least so many ids: all bytes, and special tokens."""
PROMPT_TOKENS, RESPONSE_TOKENS = 96, 8
AS_GPU_PROMPT_TOKENS = 192
"""Of bytes: the start that a chat template gives all prompts is longer than a block of the prefix cache, as on GPUs."""
MAX_RANKS = 16
"""At most so many training processes, unless the user says otherwise."""
ENGINE_RANKS = 4
"""At most so many vLLM processes, which need about 2 GB each."""
STEPS = 2


@dataclass(frozen=True)
class Shrunk:
    """A miniature job. Paths (models, data, output) are left for the caller."""

    config: Config
    model: dict[str, Any]
    """`config.json` of its model."""
    reward: dict[str, Any] | None
    """And of its reward model."""
    changes: list[Change]


@dataclass(frozen=True)
class Change:
    """Something of the job that its miniature has otherwise, besides size."""

    key: str
    was: object
    is_now: object
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.was} -> {self.is_now} ({self.reason})"


def cut_layout(layout: LayoutConfig, room: int, layers: int) -> LayoutConfig:
    """The layout on at most `room` ranks: replicas go first, then context ranks, stages and tensor ranks; what is more
    than one stays so as long as there is room."""
    sizes = {"dp": layout.dp, "cp": layout.cp, "pp": layout.pp, "tp": layout.tp}
    for least in (2, 1):
        for axis in sizes:
            while prod(sizes.values()) > room and _divided(sizes[axis]) >= least:
                sizes[axis] = _divided(sizes[axis])
    cut = replace(layout, dp=sizes["dp"], cp=sizes["cp"], pp=sizes["pp"], tp=sizes["tp"])
    if cut == layout:
        return layout
    uneven = cut.pp > 1 and len(set(parallel_layout(layout).stage_layers(layers) or ())) > 1
    return replace(
        cut,
        ep=gcd(cut.ep, cut.tp * cut.cp * cut.dp),
        vpp=cut.vpp if cut.pp > 1 else None,
        sequence_parallel=cut.sequence_parallel and cut.tp > 1,
        first_stage_layers=cut.first_stage_layers if uneven else None,
        last_stage_layers=cut.last_stage_layers if uneven else None,
    )


def _divided(size: int) -> int:
    """By its smallest factor; 0 for 1."""
    return size // next((factor for factor in range(2, size + 1) if size % factor == 0), size + 1)


def shrink_layout(layout: LayoutConfig, layers: int) -> tuple[LayoutConfig, int]:
    """The layout over as few layers as keep its shape, and how many those are: one a chunk, and where stages are uneven
    two in those that have more than the smallest."""
    grid = parallel_layout(layout)
    stages = grid.stage_layers(layers)
    assert stages is not None, f"{layers} layers do not divide into {grid}"
    small = [grid.vpp * (1 + (size > min(stages))) for size in stages]
    first, last = layout.first_stage_layers, layout.last_stage_layers
    shrunk = replace(
        layout,
        first_stage_layers=None if first is None else small[0],
        last_stage_layers=None if last is None else small[-1],
    )
    return shrunk, sum(small)


def shrink_model(
    config: Mapping[str, Any], tensor_parallel: Sequence[int], expert_parallel: int, layers: int
) -> dict:
    """`config.json` of the miniature, for these tensor-parallel sizes (of training and of vLLM).

    Heads, KV heads and the vocabulary keep their remainders by each of the sizes; queries a KV head stay.
    """
    spec = parse_config(dict(config), "the model's config.json")
    modulus = lcm(*tensor_parallel)
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
    """The smallest number from `least` on with the remainder of `value`."""
    return least + (value - least) % modulus


def shrink_config(
    config: Config,
    model: Mapping[str, Any],
    room: int,
    reward: Mapping[str, Any] | None = None,
    as_gpu: bool = False,
) -> Shrunk:
    """The miniature job on at most `room` training ranks; `model` and `reward` are the `config.json` of the job's model
    and reward model. With `as_gpu` each rank of the actor has a device that other groups and engines share."""
    spec = parse_config(dict(model), config.model.path)
    changes: list[Change] = []

    def note(key: str, was: object, is_now: object, reason: str) -> None:
        if was != is_now:
            changes.append(Change(key, was, is_now, reason))

    critic_layout, with_critic = (
        config.critic.layout,
        config.critic.layout is not None and config.needs_critic,
    )
    apart = with_critic + (reward is not None)
    own_room = max(1, room // (2 + apart))  # of each group beside the actor's
    at_most = f"at most {room} training ranks"
    layout = cut_layout(config.actor.layout, room - apart * own_room, spec.num_layers)
    devices = parallel_layout(layout).world_size
    if as_gpu:
        own_room = min(own_room, devices)
    note("actor.layout", _text(config.actor.layout), _text(layout), at_most)
    if critic_layout is not None and with_critic:
        critic_layout = cut_layout(critic_layout, own_room, spec.num_layers)
        note("critic.layout", _text(config.critic.layout), _text(critic_layout), at_most)
    reward_model, small_reward = config.reward_model, None
    if reward is not None:
        reward_model, small_reward = _shrink_reward(reward_model, reward, own_room)
        note(
            "reward_model.layout",
            _text(config.reward_model.layout),
            _text(reward_model.layout),
            at_most,
        )
    rollout_tp = min(config.rollout.tensor_parallel_size, ENGINE_RANKS)
    of_engines = ENGINE_RANKS
    if as_gpu and config.rollout.placement == "colocated":
        of_engines = min(ENGINE_RANKS, devices)
    while rollout_tp > of_engines:
        rollout_tp = _divided(rollout_tp)
    engines = max(1, min(config.rollout.engines, 2, of_engines // rollout_tp))
    note("rollout.engines", config.rollout.engines, engines, f"at most {of_engines} vLLM processes")
    note(
        "rollout.tensor_parallel_size", config.rollout.tensor_parallel_size, rollout_tp, "the same"
    )

    layout, layers = shrink_layout(layout, spec.num_layers)
    if critic_layout is not None:
        critic_layout, of_critic = shrink_layout(critic_layout, spec.num_layers)
        layers = lcm(layers, of_critic) if layers % of_critic else layers
    sizes = [layout.tp, rollout_tp, *([critic_layout.tp] if critic_layout is not None else [])]
    small_model = shrink_model(
        model, sizes, max(layout.ep, critic_layout.ep if critic_layout else 1), layers
    )
    if config.algorithm.filter_groups.enable:
        note(
            "algorithm.filter_groups.enable",
            True,
            False,
            "completions of random weights score alike",
        )
    nodes = 1 if config.cluster.ray_address is None else config.cluster.num_nodes
    note(
        "cluster.num_nodes", config.cluster.num_nodes, nodes, "cluster.ray_address names no cluster"
    )
    platform: PlatformKind = "as_gpu" if as_gpu else "cpu"
    note("cluster.platform", config.cluster.platform, platform, "without GPUs")
    prompt_tokens = AS_GPU_PROMPT_TOKENS if as_gpu else PROMPT_TOKENS
    batches, n = _batches(config, [layout] if critic_layout is None else [layout, critic_layout])
    small = replace(
        config,
        data=replace(
            config.data,
            train_batch_size=batches["train"],
            gen_batch_size=None,
            max_prompt_length=min(config.data.max_prompt_length, prompt_tokens),
            max_response_length=min(config.data.max_response_length, RESPONSE_TOKENS),
            overlong_prompts="truncate_right" if as_gpu else "truncate_left",
            val_max_samples=2,
        ),
        actor=replace(
            config.actor,
            layout=layout,
            optim=_early(config.actor.optim),
            ppo_mini_batch_size=batches["actor"],
            ppo_micro_batch_size_per_gpu=1,
            ppo_max_token_len_per_gpu=2 * (prompt_tokens + RESPONSE_TOKENS),
        ),
        critic=replace(
            config.critic,
            layout=critic_layout,
            optim=_early(config.critic.optim),
            ppo_mini_batch_size=None
            if config.critic.ppo_mini_batch_size is None
            else batches["critic"],
            ppo_micro_batch_size_per_gpu=None
            if config.critic.ppo_micro_batch_size_per_gpu is None
            else 1,
            ppo_max_token_len_per_gpu=None,
        ),
        rollout=replace(
            config.rollout,
            n=n,
            engines=engines,
            tensor_parallel_size=rollout_tp,
            max_num_seqs=16,
            kv_cache_gib=0.1,
            threads=1,
            enforce_eager=True,
            stop_token_ids=(),  # of another vocabulary
        ),
        algorithm=replace(
            config.algorithm, filter_groups=replace(config.algorithm.filter_groups, enable=False)
        ),
        reward=replace(
            config.reward,
            workers=1,
            overlong_buffer=replace(
                config.reward.overlong_buffer, len=min(4, config.reward.overlong_buffer.len)
            ),
        ),
        trainer=replace(
            config.trainer,
            total_training_steps=STEPS,
            critic_warmup=min(config.trainer.critic_warmup, 1),
            test_freq=0,
            save_freq=1,
            save_at_end=True,
            save_optimizer=True,
            max_wall_clock_s=None,
        ),
        reward_model=reward_model,
        cluster=replace(config.cluster, platform=platform, num_nodes=nodes, threads_per_rank=1),
    )
    return Shrunk(small, small_model, small_reward, changes)


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


def _batches(config: Config, layouts: Sequence[LayoutConfig]) -> tuple[dict[str, int], int]:
    """Prompts of a step and of each mini-batch, and completions a prompt.

    A data-parallel rank gets two sequences a mini-batch, or a round of an interleaved pipeline; a step as many
    mini-batches as the job's, at most two.
    """
    n = min(config.rollout.n, 2)
    replicas = lcm(*(layout.dp for layout in layouts))
    rounds = lcm(2, *(layout.pp for layout in layouts if layout.vpp is not None and layout.vpp > 1))
    prompts = replicas * rounds
    of_critic = config.critic.ppo_mini_batch_size or config.actor.ppo_mini_batch_size
    steps = {
        name: min(2, max(1, config.data.train_batch_size // mini))
        for name, mini in (("actor", config.actor.ppo_mini_batch_size), ("critic", of_critic))
    }
    train = prompts * lcm(*steps.values())
    return {"train": train, **{name: train // count for name, count in steps.items()}}, n


def _early(optim: OptimConfig) -> OptimConfig:
    """At its full learning rate by the second step."""
    return replace(optim, lr_warmup_steps=min(optim.lr_warmup_steps, STEPS - 1))


def _text(layout: LayoutConfig | None) -> str:
    grid: ParallelLayout | None = None if layout is None else parallel_layout(layout)
    return str(grid)
