"""Seconds of each phase of a step: a roofline with named hardware numbers.

Invariant: every phase is work (operations, bytes, messages) divided by a rate of `hardware.yaml`,
plus the waiting that the schedule makes (pipeline bubble, longest completion); what of a step
overlaps is said in `schedule.py`. Lengths are the job's mean lengths. Pure: numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle
from rlhf3d.planning.checkpoint import checkpoint_bytes
from rlhf3d.planning.engines import engine_elements
from rlhf3d.planning.job import Job, Model
from rlhf3d.planning.memory import FORWARD_PHASES, states_of
from rlhf3d.planning.search.flops import (
    attention_products,
    expert_bytes,
    head_flops,
    mlp_products,
)
from rlhf3d.planning.search.generation import generate_time
from rlhf3d.planning.search.phase_time import PhaseTime, ring_bytes
from rlhf3d.planning.search.schedule import Schedule, make_schedule
from rlhf3d.planning.states import chunk_sizes
from rlhf3d.units import ITEM_BYTES, round_up

ADAM_BYTES = {"te": 34, "local": 120}
"""Memory traffic of an optimizer step for a parameter: one fused pass, or torch's dozen
operations."""
FORWARD = ("score", "old_logprobs", "ref_logprobs", "values")
UPDATE = ("update_critic", "update_actor")
BACKWARD = 2.0
"""A backward pass's operations over the forward pass's."""
UNFILLED = 0.25
"""Sequences of mean length that a token budget lacks: what is left of it is too short for
another."""
EXPERT_SPREAD = 0.1
"""Standard deviation of the experts' loads over their mean, on texts of one kind, for each doubling
of their number: finer experts are more special (rule of thumb; 0.3 with 8 experts, 0.7 with
128)."""
HEAD_BACKWARD = 3.0
"""The head computes its logits again."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a step and of the run."""

    phases: tuple[PhaseTime, ...]
    """Of one step; a save counts with its share of the steps between two."""
    tokens: float
    """Of a step: prompts and completions."""
    steps: int | None
    devices: int
    schedule: Schedule
    in_turn_s: float
    """Seconds of a step if generation and training were one after the other."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.schedule.step_s

    @property
    def tokens_s(self) -> float:
        """Tokens a second, of prompts and completions."""
        return self.tokens / self.step_s

    @property
    def hours(self) -> float | None:
        """Hours of the run, without validations; None while its steps are not known."""
        return None if self.steps is None else self.steps * self.step_s / 3600

    @property
    def device_hours(self) -> float | None:
        """Hours times devices."""
        return None if self.hours is None else self.hours * self.devices


@dataclass(frozen=True)
class Stage:
    """One micro-batch on one rank of a pipeline stage."""

    compute_s: float
    """Matrix products and the host's part."""
    messages_s: float
    """Collectives and messages."""

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute_s + self.messages_s


def plan_time(job: Job) -> TimePlan:
    """Return the time of a job's step."""
    training = training_phases(job)
    phases = [sync_time(job), generate_time(job), *training]
    tokens = job.derived.sequences_per_step * job.lengths.total
    devices = job.devices_needed if job.on_gpu else 1
    return TimePlan(
        tuple(phases),
        tokens,
        job.derived.total_steps,
        devices,
        make_schedule(job, phases),
        _in_turn_s(job, training),
    )


def training_phases(job: Job) -> list[PhaseTime]:
    """Return what does not depend on the engines: passes, updates, the share of a save."""
    phases = []
    for role in ("reward", "actor", "ref", "critic"):
        model = job.model(role)
        if model is not None and job.has_pass(model):
            phases.append(forward_time(job, model))
    for role in ("critic", "actor"):
        model = job.model(role)
        if model is not None:
            phases.append(update_time(job, model))
    if job.config.trainer.save_freq:
        phases.append(save_time(job))
    return phases


def _in_turn_s(job: Job, training: Sequence[PhaseTime]) -> float:
    """Seconds of the same step on the same devices with rollout.max_staleness = 0."""
    rollout = replace(job.config.rollout, max_staleness=0, update="between_batches")
    job = replace(job, config=replace(job.config, rollout=rollout))
    return make_schedule(job, [sync_time(job), generate_time(job), *training]).step_s


def _padded(job: Job, model: Model, backward: bool) -> float:
    """Positions of a sequence of mean length; completions of one micro-batch share their prompt's.

    A micro-batch's rows are neighbors in the order of lengths, which are taken to be spread evenly
    up to the longest.
    """
    mean, longest = job.lengths.total, job.derived.max_sequence_length
    rule = model.batching.micro_batching
    if job.lengths.padded is not None:
        return job.lengths.padded
    sequences = _sequences(job, model, backward)
    rows = min(sequences, rule.rows if rule.tokens is None else rule.tokens / mean)
    if rule.share_prefixes and job.config.rollout.n > 1:
        completions = max(1.0, min(rows, job.config.rollout.n))
        return job.lengths.response + job.lengths.prompt / completions
    if rule.packed:
        return mean
    # Neighbors in that order differ by longest / sequences, and the widest of `rows` is
    # (rows - 1) / 2 such gaps above their mean; rounding up adds half a multiple on average.
    spread = max(0.0, rows - 1) / 2 * longest / sequences
    return min(longest, mean + spread + (rule.multiple_of - 1) / 2)


def _sequences(job: Job, model: Model, backward: bool) -> float:
    """Sequences of a data-parallel rank that are cut into micro-batches together.

    Those of an optimizer step, or of a pass over a step's batch.
    """
    in_all = job.derived.sequences_per_step
    if backward:
        in_all = model.batching.sequences_per_mini_batch
    return in_all / model.layout.dp


def _micro_batches(job: Job, model: Model, backward: bool) -> tuple[float, int]:
    """Sequences of a micro-batch, and micro-batches that a rank computes together."""
    rule, layout = model.batching.micro_batching, model.layout
    sequences = _sequences(job, model, backward)
    rows = float(rule.rows)
    if rule.tokens is not None:
        rows = max(1.0, rule.tokens / _padded(job, model, backward) - UNFILLED)
    # A quotient of floats may be a hair above the integer that it means.
    count = max(1, math.ceil(sequences / rows - 1e-9))
    if layout.vpp > 1:
        count = round_up(count, layout.pp)  # as Megatron's interleaved schedule wants
    return sequences / count, count


def stages(job: Job, model: Model, backward: bool) -> list[Stage]:
    """Return each pipeline stage's part of a micro-batch, forward or forward and backward."""
    spec, layout, settings = model.spec, model.layout, model.settings
    hardware, item = job.cluster.hardware, ITEM_BYTES[job.config.model.dtype]
    rows, _ = _micro_batches(job, model, backward)
    width = _padded(job, model, backward)
    positions, responses = rows * width / layout.cp, rows * job.lengths.response / layout.cp
    # The peak is the device's; on CPU `cores` processes share it.
    rate = hardware.matmul_flops(job.config.model.dtype) / hardware.cores
    # A causal position attends to half of a row on average, of which others may be positions.
    context = max(width, job.lengths.total) / 2
    layer, collectives = _layer_passes_s(job, model, backward, positions, context, rate)
    hidden_bytes = positions * spec.hidden_size * item
    if settings.sequence_parallel:
        hidden_bytes /= layout.tp
    # Ranks of neighboring stages are `stage_size` apart.
    message_s = hidden_bytes / job.cluster.bandwidth(2, stride=layout.stage_size)
    message_s += job.cluster.latency_s(2, stride=layout.stage_size)
    # One message a chunk: its input, and in a backward pass its gradient.
    messages = layout.vpp * (1 + backward) if layout.pp > 1 else 0
    head_s = head_flops(spec, responses) / layout.tp / rate * (1 + HEAD_BACKWARD * backward)
    found = []
    sizes = layout.stage_layers(spec.num_layers)
    assert sizes is not None, f"{layout} does not fit {spec.num_layers} layers"
    for pp, layers in enumerate(sizes):
        compute = layers * layer
        if pp == layout.pp - 1 and model.head == "lm":
            compute += head_s
        found.append(Stage(compute, layers * collectives + messages * message_s))
    return found


def _layer_passes_s(
    job: Job, model: Model, backward: bool, positions: float, context: float, rate: float
) -> tuple[float, float]:
    """Seconds of computing and of collectives of one layer: forward, backward, and again."""
    recompute = model.settings.recompute
    hidden_bytes = positions * model.spec.hidden_size * ITEM_BYTES[job.config.model.dtype]
    attention, mlp = _layer_s(job, model, positions, context, rate)
    of_attention, of_mlp = _layer_messages(job, model, hidden_bytes)
    of_attention += _context_messages_s(job, model, positions, context / rate)
    passes = 1.0 + BACKWARD * backward
    compute, collectives = (attention + mlp) * passes, (of_attention + of_mlp) * passes
    # Recomputation repeats forward work in the backward pass, with its collectives.
    if backward and recompute != "none":
        again = recompute == "full"  # else the MLP alone
        compute += mlp + attention * again
        collectives += of_mlp + of_attention * again
    return compute, collectives


def _layer_s(
    job: Job, model: Model, positions: float, context: float, rate: float
) -> tuple[float, float]:
    """One layer's forward pass, products and host: its attention, and its MLP or experts.

    The busiest expert-parallel rank is waited for by all. Half of the host's time of a layer is
    each one's.
    """
    spec, layout, hardware = model.spec, model.layout, job.cluster.hardware

    def products_flops(rows: float, products: tuple[tuple[float, float], ...]) -> float:
        return sum(hardware.product_flops(rows, *sides) for sides in products)

    # Scores and their product with the values: two products of two operations each.
    scores = positions * 4 * spec.num_heads * spec.head_dim * context / layout.tp
    projections = products_flops(positions, attention_products(spec, layout.tp))
    attention = (projections + scores) / rate
    host = hardware.layer_overhead_s / 2
    if not spec.num_experts:
        mlp = products_flops(positions, mlp_products(spec, layout.tp)) / rate
        return attention + host, mlp + host
    # Tensor ranks share out the tokens; experts' matrices are complete.
    own = positions / layout.tp
    experts_here = spec.num_experts / layout.ep
    # After the exchange a rank has as many copies as it sent, over its own experts.
    rows = own * spec.experts_per_token / experts_here
    experts = experts_here * products_flops(rows, mlp_products(spec, 1)) / rate
    if job.on_gpu:
        moved = own * expert_bytes(spec, ITEM_BYTES[job.config.model.dtype])
        experts += moved / hardware.read_bytes_s
    router = 2 * own * spec.hidden_size * spec.num_experts / rate
    waited = experts * busiest_rank(spec, layout.ep)
    return attention + host, router + waited + host + hardware.expert_overhead_s


def busiest_rank(spec: ModelSpec, ep: int) -> float:
    """Return the tokens of the busiest of `ep` expert-parallel ranks over the mean.

    The loads of experts are taken to be independent.
    """
    if ep == 1:
        return 1.0
    # A rank's load is the mean of num_experts / ep experts, whose deviation falls with the root of
    # their number; the largest of n normal numbers is sqrt(2 ln n) deviations above the mean.
    spread = EXPERT_SPREAD * math.log2(spec.num_experts) * math.sqrt(ep / spec.num_experts)
    return 1 + spread * math.sqrt(2 * math.log(ep))


def _layer_messages(job: Job, model: Model, hidden_bytes: float) -> tuple[float, float]:
    """Collectives of one layer's forward pass, of its attention and of its MLP.

    A sum over tensor ranks each; instead of the MLP's, two exchanges between expert ranks.
    """
    spec, layout, cluster = model.spec, model.layout, job.cluster
    all_reduce = exchanges = 0.0
    if layout.tp > 1:
        all_reduce = ring_bytes(layout.tp, hidden_bytes) / cluster.bandwidth(layout.tp)
        all_reduce += cluster.latency_s(layout.tp)
    if layout.ep > 1:
        copies = spec.experts_per_token * hidden_bytes / layout.tp
        exchanges = 2 * cluster.exchange_s(layout.ep, copies * busiest_rank(spec, layout.ep))
    return all_reduce, exchanges if spec.num_experts else all_reduce


def _context_messages_s(job: Job, model: Model, positions: float, seconds_a_flop: float) -> float:
    """Keys and values of the other context-parallel ranks, once a pass.

    On GPUs they come behind the attention, as far as that lasts.
    """
    spec, layout = model.spec, model.layout
    if layout.cp == 1:
        return 0.0
    item = ITEM_BYTES[job.config.model.dtype]
    keys_and_values = 2 * positions * spec.num_kv_heads * spec.head_dim / layout.tp * item
    received = (layout.cp - 1) * keys_and_values
    seconds = received / job.cluster.bandwidth(layout.cp, stride=layout.tp)
    seconds += job.cluster.latency_s(layout.cp, stride=layout.tp)
    # `seconds_a_flop` is of one operation for each position of the context.
    attention = 4 * positions * spec.num_heads * spec.head_dim / layout.tp * seconds_a_flop
    return max(0.0, seconds - attention) if job.on_gpu else seconds


def _scheduled(job: Job, model: Model, parts: list[Stage], micro_batches: int) -> dict[str, float]:
    """Seconds of `micro_batches` through the pipeline: the slowest stage's work, and its waiting.

    On CPU the ranks share the cores: all of their work over all cores, if that is more than what
    one rank does.
    """
    layout, cores = model.layout, job.cluster.hardware.cores
    slowest = max(parts, key=lambda stage: stage.total)
    compute, messages = micro_batches * slowest.compute_s, micro_batches * slowest.messages_s
    # The pipeline fills and drains: a stage's time for each other stage, or with interleaving a
    # chunk's.
    bubble = (layout.pp - 1) / layout.vpp * slowest.total
    if not job.on_gpu:
        shared = micro_batches * layout.stage_size / cores
        all_compute = shared * sum(stage.compute_s for stage in parts)
        all_messages = shared * sum(stage.messages_s for stage in parts)
        if all_compute + all_messages > compute + messages + bubble:
            return {"compute": all_compute, "messages": all_messages}
    return {"compute": compute, "messages": messages, "bubble": bubble}


def _moved_s(job: Job, model: Model, optimizer: bool) -> float:
    """Seconds in which states that wait in host memory come and go again."""
    if not job.config.model.offload:
        return 0.0
    states = states_of(job, model, rank=0)
    # GPUs copy side by side; on CPU all ranks share one host's memory.
    sharing = 1 if job.on_gpu else model.layout.world_size
    moved = 2 * sharing * (states.weights + states.optimizer * optimizer)
    return moved / (job.cluster.hardware.host_gbs * 1e9)


def forward_time(job: Job, model: Model) -> PhaseTime:
    """Return the time of a pass without gradients over a step's batch."""
    _, micro_batches = _micro_batches(job, model, backward=False)
    parts = _scheduled(job, model, stages(job, model, backward=False), micro_batches)
    parts["states moved"] = _moved_s(job, model, optimizer=False)
    return PhaseTime(FORWARD_PHASES[model.role], parts)


def update_time(job: Job, model: Model) -> PhaseTime:
    """Return the time of all optimizer steps of a model."""
    layout, settings = model.layout, model.settings
    _, micro_batches = _micro_batches(job, model, backward=True)
    by_stage = stages(job, model, backward=True)
    elements = stage_elements(model.spec, layout, model.head, job.style)
    fullest = max(elements)
    once = _scheduled(job, model, by_stage, micro_batches)
    once["gradients over replicas"] = _reduced_s(job, model, by_stage, fullest)
    owned = fullest / (layout.replicas if settings.distributed_optimizer else 1)
    traffic = owned * ADAM_BYTES[job.style] + 8 * fullest  # and gradients zeroed, their norm taken
    if not job.on_gpu:
        traffic *= sum(elements) / fullest * layout.stage_size  # ranks share the memory's bandwidth
    once["optimizer"] = traffic / job.cluster.hardware.read_bytes_s
    steps = model.batching.optimizer_steps_per_step
    parts = {name: seconds * steps for name, seconds in once.items()}
    parts["states moved"] = _moved_s(job, model, optimizer=True)
    return PhaseTime(f"update_{model.role}", parts)


def _reduced_s(job: Job, model: Model, by_stage: list[Stage], elements: int) -> float:
    """Gradients over the replicas, and with the distributed optimizer weights back, per step.

    Overlap hides as much of them as the compute that they run behind lasts.
    """
    layout, settings = model.layout, model.settings
    if layout.replicas == 1:
        return 0.0
    bandwidth = job.cluster.bandwidth(layout.replicas, stride=layout.tp)
    share = (layout.replicas - 1) / layout.replicas
    slowest = max(stage.compute_s for stage in by_stage)
    # fp32. A reduce-scatter sends all but the own share.
    gradients = 4 * elements * share / bandwidth
    if not settings.distributed_optimizer:
        gradients *= 2  # an all-reduce, and no reduce-scatter
    if settings.overlap_grad_reduce:
        gradients = max(0.0, gradients - slowest * 2 / 3)  # the last micro-batch's backward pass
    if not settings.distributed_optimizer:
        return gradients
    weights = ITEM_BYTES[job.config.model.dtype] * elements * share / bandwidth
    if settings.overlap_param_gather:
        steps = model.batching.optimizer_steps_per_step
        # Behind the next step's first forward pass, which the last step has not.
        weights -= min(weights, slowest / 3) * (steps - 1) / steps
    return gradients + weights


@cache
def stage_elements(
    spec: ModelSpec, layout: ParallelLayout, head: Head, style: SpecStyle
) -> tuple[int, ...]:
    """Return the weights of a rank, by pipeline stage."""
    totals = []
    for pp in range(layout.pp):
        chunks = [chunk_sizes(spec, layout, pp, n, head, style) for n in range(layout.vpp)]
        totals.append(sum(chunk.total for chunk in chunks))
    return tuple(totals)


def sync_time(job: Job) -> PhaseTime:
    """Return the time of a weight sync: an engine rank's bytes through its buckets.

    Between devices go those that are not on its own. Closed form of the plan's lower bound
    (docs/resharding.md): among n training shards an engine rank of g finds 1/n of the model on its
    device.
    """
    rollout, hardware, actor = job.config.rollout, job.cluster.hardware, job.derived.layout
    tp = rollout.tensor_parallel_size
    needed = engine_elements(job.spec, tp, rollout.expert_parallel) * ITEM_BYTES[rollout.dtype]
    streams = 1 if job.on_gpu else tp  # engines read the same buckets
    buckets = needed / job.sync_bucket_bytes * hardware.sync_bucket_s
    parts = {
        "buckets": needed * streams / (hardware.sync_gbs * 1e9) + buckets,
        "sleep and wake-up": hardware.rest_s * rollout.sleep,
    }
    if job.on_gpu:
        local = tp / (actor.tp * actor.pp) if job.colocated else 0.0
        received = needed * max(0.0, 1 - local)
        parts["between devices"] = received / job.cluster.bandwidth(actor.world_size)
    parts["states moved"] = _moved_s(job, job.models[0], optimizer=False)
    return PhaseTime("sync_weights", parts)


def save_time(job: Job) -> PhaseTime:
    """Return a step's share of a save.

    Every trained model, and the policy as a Hugging Face folder.
    """
    trainer, written = job.config.trainer, checkpoint_bytes(job)
    if trainer.save_hf == "always":
        written += engine_elements(job.spec, 1, False) * ITEM_BYTES[job.config.model.dtype]
    # A save in the background takes no time of the step.
    seconds = 0.0 if trainer.async_save else written / (job.cluster.hardware.disk_gbs * 1e9)
    return PhaseTime("save_checkpoint", {"disk": seconds / trainer.save_freq})
