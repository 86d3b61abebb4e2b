"""Whether batch sizes, layouts and devices come out even.

Invariant: as in `checks.py`: each problem is a sentence with key, value, arithmetic and fix. Sizes
are at least 1 here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.derived import (
    SHARING_PLATFORMS,
    WIDTH_MULTIPLE,
    Batching,
    actor_batching,
    critic_batching,
    micro_batching_of,
)
from rlhf3d.config.groups import WorkerGroup, device_terms, group_of, worker_groups
from rlhf3d.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RolloutConfig


def check_sizes(config: Config) -> Iterator[str]:
    """Everything that does not come out even."""
    groups = worker_groups(config)
    for group in groups:
        yield from _check_layout(group)
    yield from check_sharing(config.model, groups, config.cluster.platform)
    if config.cluster.platform == "cuda":
        yield from _check_dtype(groups, config.model)
        yield from _check_devices(groups, config.rollout, config.cluster)
    updates = {"actor": actor_batching(config.actor)}
    if config.needs_critic:
        updates["critic"] = critic_batching(config.actor, config.critic)
    checked = []
    for role, batching in updates.items():
        group = group_of(groups, role)
        # The same sizes in the same layout are reported once.
        if (group, batching) in checked:
            continue
        checked.append((group, batching))
        yield from _check_mini_batch(config.data.train_batch_size, role, batching.mini_batch_size)
        if batching.max_tokens is None:
            yield from _check_fixed(config.rollout.n, role, batching, group)
        else:
            rule = micro_batching_of(config, role)
            yield from _check_budget(config.data, role, rule, group, config.cluster.platform)


def check_sharing(
    model: ModelConfig, groups: Sequence[WorkerGroup], platform: str
) -> Iterator[str]:
    """Whether prefixes can be shared where that is asked for."""
    if model.share_prefixes is not True:
        return
    fix = "set model.share_prefixes=auto or false"
    # The others are resolved when a run starts, and checked again.
    if platform not in (*SHARING_PLATFORMS, "auto", "as_gpu"):
        yield (
            f"model.share_prefixes = true with cluster.platform = {platform}: "
            f"Transformer Engine's attention has no sequences that share their beginnings; {fix}"
        )
    for group in groups:
        if group.layout.cp > 1:
            yield (
                f"model.share_prefixes = true with {group.key}.cp = {group.layout.cp}: "
                f"context-parallel ranks take parts of each sequence by itself; {fix}, or "
                f"{group.key}.cp=1"
            )


def _check_layout(group: WorkerGroup) -> Iterator[str]:
    layout, key = group.layout_config, group.key
    if (layout.vpp or 1) > 1 and layout.pp == 1:
        yield f"{key}.vpp = {layout.vpp}: needs {key}.pp above 1; set vpp=null"
    if layout.sequence_parallel and layout.tp == 1:
        yield f"{key}.sequence_parallel = true: needs {key}.tp above 1"
    if layout.overlap_param_gather:
        # The distributed optimizer is what gathers, and overlap_grad_reduce makes its buckets.
        for name in ("distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(layout, name):
                yield f"{key}.overlap_param_gather = true: needs {key}.{name} = true"


def _check_dtype(groups: tuple[WorkerGroup, ...], model: ModelConfig) -> Iterator[str]:
    for group in groups:
        if group.layout.cp > 1 and model.dtype == "float32":
            yield (
                f"{group.key}.cp = {group.layout.cp} with model.dtype = float32: Transformer "
                "Engine's context-parallel attention is for bfloat16; set model.dtype=bfloat16, "
                "or cp=1"
            )


def _check_devices(
    groups: tuple[WorkerGroup, ...], rollout: RolloutConfig, cluster: ClusterConfig
) -> Iterator[str]:
    """On GPUs: whether dedicated devices and colocated engines find room."""
    gpus = cluster.num_nodes * cluster.gpus_per_node
    terms = device_terms(groups, rollout)
    needed = sum(count for _, count in terms)
    if needed > gpus:
        total = "" if len(terms) == 1 else f" = {needed} GPUs"
        yield (
            f"{' + '.join(text for text, _ in terms)}{total}, more than cluster.num_nodes "
            f"{cluster.num_nodes} x gpus_per_node {cluster.gpus_per_node} = {gpus} GPUs"
        )
    ranks = rollout.engines * rollout.tensor_parallel_size
    if rollout.placement == "colocated" and ranks > gpus:
        yield (
            f"rollout.engines {rollout.engines} x rollout.tensor_parallel_size "
            f"{rollout.tensor_parallel_size} = {ranks} GPUs, more than {gpus}"
        )


def _check_mini_batch(batch: int, role: str, mini: int) -> Iterator[str]:
    if batch % mini:
        yield (
            f"data.train_batch_size = {batch} prompts do not divide by {role}.ppo_mini_batch_size "
            f"= {mini}: {batch} % {mini} = {batch % mini}"
        )


def _check_fixed(n: int, role: str, batching: Batching, group: WorkerGroup) -> Iterator[str]:
    """Micro-batches of a fixed number of sequences must come out even on every rank."""
    mini, micro = batching.mini_batch_size, batching.micro_batch_size
    mini_key, micro_key = f"{role}.ppo_mini_batch_size", f"{role}.ppo_micro_batch_size_per_gpu"
    layout, layout_key = group.layout_config, group.key
    sequences = mini * n
    if sequences % layout.dp:
        yield (
            f"{mini_key} = {mini} prompts x rollout.n = {n} = {sequences} sequences do not divide "
            f"over {layout_key}.dp = {layout.dp} ranks: {sequences} % {layout.dp} = "
            f"{sequences % layout.dp}"
        )
        return
    per_rank = sequences // layout.dp
    if per_rank % micro:
        yield (
            f"{mini_key} = {mini} x rollout.n = {n} / {layout_key}.dp = {layout.dp} = {per_rank} "
            f"sequences per rank do not divide by {micro_key} = {micro}: {per_rank} % {micro} = "
            f"{per_rank % micro}"
        )
    # Megatron's interleaved schedule works in rounds of pp micro-batches.
    elif (layout.vpp or 1) > 1 and per_rank // micro % layout.pp:
        yield (
            f"{micro_key} = {micro} makes {per_rank // micro} micro-batches per rank; interleaving "
            f"({layout_key}.vpp = {layout.vpp}) needs a multiple of {layout_key}.pp = {layout.pp}"
        )


def _check_budget(
    data: DataConfig, role: str, rule: MicroBatching, group: WorkerGroup, platform: str
) -> Iterator[str]:
    """A micro-batch of a token budget must hold the longest sequence there can be."""
    prompt, response = data.max_prompt_length, data.max_response_length
    # As the batch would have it: rounded up to the multiple of ranks and kernels.
    longest = rule.width(prompt + response)
    if rule.tokens is None or longest <= rule.tokens:
        return
    rounded = _rounding_text(group, platform, rule.multiple_of)
    yield (
        f"{role}.ppo_max_token_len_per_gpu = {rule.tokens}: below the longest sequence, "
        f"data.max_prompt_length {prompt} + data.max_response_length {response}{rounded} = "
        f"{longest} tokens; set {longest} or more"
    )


def rows_of_trajectory_notes(
    data: DataConfig, turns: int, policy_loss: str, rule: MicroBatching
) -> Iterator[str]:
    """Why a trajectory with a row for each turn would not fit into a micro-batch of the actor's.

    Of losses that need its rows together. No problem: most trajectories have fewer.
    """
    prompt, response = data.max_prompt_length, data.max_response_length
    needed, given, key = turns, rule.rows, "ppo_micro_batch_size_per_gpu"
    most = f"environment.max_turns = {turns} rows"
    if rule.tokens is not None:
        # A row that begins anew is no longer than a first prompt with all that may follow it.
        needed, given = rule.positions([prompt + response] * turns), rule.tokens
        key = "ppo_max_token_len_per_gpu"
        most = (
            f"environment.max_turns {turns} x (data.max_prompt_length {prompt} + "
            f"data.max_response_length {response}) = {needed} tokens"
        )
    if needed > given:
        yield (
            f"actor.policy_loss = {policy_loss} needs all rows of a trajectory in one "
            f"micro-batch: at most {most}, and actor.{key} = {given}; one that needs more than "
            "that stops the run"
        )


def _rounding_text(group: WorkerGroup, platform: str, multiple_of: int) -> str:
    """Of what widths are multiples, and why: `derived.width_multiples` in words."""
    if multiple_of == 1:
        return ""
    layout, kernels = group.layout_config, WIDTH_MULTIPLE.get(platform, 1)
    factors = []
    if layout.cp > 1:
        factors += ["2", f"{group.key}.cp"]
    if layout.sequence_parallel and layout.tp > 1:
        factors.append(f"{group.key}.tp")
    parts = []
    if factors:
        parts.append(" x ".join(factors))
    if kernels > 1:
        parts.append(str(kernels))
    total = f" = {multiple_of}" if factors else ""
    return f", rounded up to a multiple of {' and '.join(parts)}{total}"
