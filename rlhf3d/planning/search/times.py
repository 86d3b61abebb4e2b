"""Seconds of each phase of a step: a roofline with named hardware numbers.

Invariant: every phase is work (operations, bytes, messages) divided by a rate of `hardware.yaml`, plus the waiting that
the schedule makes (pipeline bubble, longest completion). Lengths are the job's mean lengths. Pure: numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle
from rlhf3d.planning.engines import (
    engine_elements,
    engine_memory,
    engine_weight_bytes,
    kv_bytes_a_token,
)
from rlhf3d.planning.job import Job, Model
from rlhf3d.planning.memory import FORWARD_PHASES, checkpoint_bytes
from rlhf3d.planning.search.flops import (
    attention_products,
    decoder_weights_read,
    expert_bytes,
    head_flops,
    layer_flops,
    mlp_products,
)
from rlhf3d.planning.states import chunk_sizes, model_states
from rlhf3d.units import ITEM_BYTES

ADAM_BYTES = {"te": 34, "local": 120}
"""Memory traffic of an optimizer step for a parameter: one fused pass, or torch's dozen operations."""
FORWARD = ("score", "old_logprobs", "ref_logprobs", "values")
UPDATE = ("update_critic", "update_actor")
BACKWARD = 2.0
"""A backward pass's operations over the forward pass's."""
UNFILLED = 0.25
"""Sequences of mean length that are missing from a token budget: what is left of it is too short for another."""
EXPERT_SPREAD = 0.1
"""Standard deviation of the experts' loads over their mean, on texts of one kind, for each doubling of their number:
finer experts are more special (rule of thumb; 0.3 with 8 experts, 0.7 with 128)."""
KERNELS = {"dense": 10, "experts": 20}
"""Kernels of a decoder layer in a decoding step: a small one takes as long as it takes to start."""
HEAD_BACKWARD = 3.0
"""The head computes its logits again."""


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase, by what takes them."""

    phase: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a step and of the run."""

    phases: tuple[PhaseTime, ...]
    """Of one step; saving is shared out over the steps between two saves."""
    tokens: float
    """Of a step: prompts and completions."""
    steps: int | None
    devices: int

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(phase.total for phase in self.phases)

    @property
    def tokens_s(self) -> float:
        """Tokens a second, of prompts and completions."""
        return self.tokens / self.step_s

    @property
    def hours(self) -> float | None:
        """Hours of the run, validations apart; None while its steps are not known."""
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
    """The time of a job's step."""
    generate = generate_time(job)
    phases = [sync_time(job), generate]
    skip_old = job.config.algorithm.rollout_correction.bypass_mode
    for role in ("reward", "actor", "ref", "critic"):
        model = job.model(role)
        if model is not None and not (role == "actor" and skip_old):
            phases.append(forward_time(job, model))
    phases += [
        update_time(job, model)
        for role in ("critic", "actor")
        if (model := job.model(role)) is not None
    ]
    if job.config.trainer.save_freq:
        phases.append(save_time(job))
    tokens = job.derived.sequences_per_step * job.lengths.total
    devices = job.devices_needed if job.on_gpu else 1
    return TimePlan(tuple(phases), tokens, job.derived.total_steps, devices)


def _padded(job: Job, model: Model, backward: bool) -> float:
    """Positions of a sequence of mean length.

    A micro-batch's rows are neighbours in the order of lengths, as far apart as if these were spread evenly up to the
    longest.
    """
    mean, longest, rule = (
        job.lengths.total,
        job.derived.max_sequence_length,
        model.batching.micro_batching,
    )
    if rule.packed:
        return mean
    if job.lengths.padded is not None:
        return job.lengths.padded
    ordered = _sequences(job, model, backward)
    rows = min(ordered, rule.rows if rule.tokens is None else rule.tokens / mean)
    apart = max(0.0, rows - 1) / 2 * longest / ordered
    return min(longest, mean + apart + (rule.multiple_of - 1) / 2)


def _sequences(job: Job, model: Model, backward: bool) -> float:
    """Sequences of a data-parallel rank that are cut into micro-batches together: an optimizer step's, or a step's."""
    of_step = job.derived.sequences_per_step
    return (model.batching.sequences_per_mini_batch if backward else of_step) / model.layout.dp


def _micro(job: Job, model: Model, backward: bool) -> tuple[float, int]:
    """Sequences of a micro-batch, and micro-batches of a rank in an optimizer step or in a pass over a step's batch."""
    rule, layout, sequences = (
        model.batching.micro_batching,
        model.layout,
        _sequences(job, model, backward),
    )
    if rule.tokens is None:
        rows = float(rule.rows)
    else:
        rows = max(1.0, rule.tokens / _padded(job, model, backward) - UNFILLED)
    count = max(1, math.ceil(sequences / rows - 1e-9))
    if layout.vpp > 1:
        count = -(-count // layout.pp) * layout.pp
    return sequences / count, count


def stages(job: Job, model: Model, backward: bool) -> list[Stage]:
    """Each pipeline stage's part of a micro-batch, forward or forward and backward."""
    spec, layout, hardware = model.spec, model.layout, job.cluster.hardware
    rows, _ = _micro(job, model, backward)
    width, item = _padded(job, model, backward), ITEM_BYTES[job.config.model.dtype]
    positions, responses = rows * width, rows * job.lengths.response
    local = positions / layout.cp
    passes, again = 1.0 + BACKWARD * backward, 0.0
    rate = hardware.matmul_flops(job.config.model.dtype) / hardware.cores
    of_attention_s, of_mlp_s = _layer_s(job, model, local, width / 2, rate)
    of_attention, of_mlp = _layer_messages(job, model, local * spec.hidden_size * item)
    of_attention += _context_messages_s(job, model, local, width / 2 / rate)
    collectives = (of_attention + of_mlp) * passes
    if backward and model.settings.recompute != "none":
        full = model.settings.recompute == "full"
        again = of_mlp_s + of_attention_s * full
        collectives += of_mlp + of_attention * full
    layer = (of_attention_s + of_mlp_s) * passes + again
    bandwidth = job.cluster.bandwidth(2, stride=layout.stage_size)
    latency_s = job.cluster.latency_s(2, stride=layout.stage_size)
    message = (
        local
        * spec.hidden_size
        * item
        / (layout.tp if model.settings.sequence_parallel else 1)
        / bandwidth
    )
    found = []
    sizes = layout.stage_layers(spec.num_layers)
    assert sizes is not None, f"{layout} does not fit {spec.num_layers} layers"
    for pp, layers in enumerate(sizes):
        compute, last = layers * layer, pp == layout.pp - 1
        if last and model.head == "lm":
            compute += (
                head_flops(spec, responses / layout.cp)
                / layout.tp
                * (1 + HEAD_BACKWARD * backward)
                / rate
            )
        sends = layout.vpp * (1 + backward) if layout.pp > 1 else 0
        found.append(Stage(compute, layers * collectives + sends * (message + latency_s)))
    return found


def _layer_s(
    job: Job, model: Model, positions: float, context: float, rate: float
) -> tuple[float, float]:
    """One layer's forward pass, products and host: its attention, and its MLP or its router and experts.

    The busiest expert-parallel rank is waited for by all. Half of the host's time of a layer is each one's.
    """
    spec, layout, hardware = model.spec, model.layout, job.cluster.hardware
    scores = positions * 4 * spec.num_heads * spec.head_dim * context / layout.tp
    projections = attention_products(spec, layout.tp)
    attention = (
        sum(hardware.product_flops(positions, *sides) for sides in projections) + scores
    ) / rate
    host = hardware.layer_overhead_s / 2
    if not spec.num_experts:
        products = sum(
            hardware.product_flops(positions, *sides) for sides in mlp_products(spec, layout.tp)
        )
        return attention + host, products / rate + host
    own, busiest = positions / layout.tp, busiest_rank(spec, layout.ep)
    here = spec.num_experts / layout.ep
    rows = own * spec.experts_per_token / here
    experts = (
        here * sum(hardware.product_flops(rows, *sides) for sides in mlp_products(spec, 1)) / rate
    )
    router = 2 * own * spec.hidden_size * spec.num_experts / rate
    moved = (
        own * expert_bytes(spec, ITEM_BYTES[job.config.model.dtype]) / hardware.read_bytes_s
        if job.on_gpu
        else 0.0
    )
    return attention + host, router + (
        experts + moved
    ) * busiest + host + hardware.expert_overhead_s


def busiest_rank(spec: ModelSpec, ep: int) -> float:
    """Tokens of the busiest of `ep` expert-parallel ranks over the mean, where the experts' loads are independent."""
    if ep == 1:
        return 1.0
    spread = EXPERT_SPREAD * math.log2(spec.num_experts) * math.sqrt(ep / spec.num_experts)
    return 1 + spread * math.sqrt(2 * math.log(ep))


def _layer_messages(job: Job, model: Model, hidden_bytes: float) -> tuple[float, float]:
    """Collectives of one layer's forward pass, of its attention and of its MLP.

    A sum over tensor ranks each; instead of the MLP's, two exchanges between expert ranks.
    """
    layout, cluster, total, exchanges = model.layout, job.cluster, 0.0, 0.0
    if layout.tp > 1:
        ring = 2 * (layout.tp - 1) / layout.tp * hidden_bytes / cluster.bandwidth(layout.tp)
        total = ring + cluster.latency_s(layout.tp)
    if layout.ep > 1:
        copies = model.spec.experts_per_token * hidden_bytes / layout.tp
        exchanges = 2 * cluster.exchange_s(layout.ep, copies * busiest_rank(model.spec, layout.ep))
    return total, exchanges if model.spec.num_experts else total


def _context_messages_s(job: Job, model: Model, positions: float, seconds_a_flop: float) -> float:
    """Keys and values of the other context-parallel ranks, once a pass; on GPUs behind the attention, as far as that
    lasts."""
    spec, layout = model.spec, model.layout
    if layout.cp == 1:
        return 0.0
    item = ITEM_BYTES[job.config.model.dtype]
    received = (
        (layout.cp - 1) * 2 * positions * spec.num_kv_heads * spec.head_dim / layout.tp * item
    )
    seconds = received / job.cluster.bandwidth(layout.cp, stride=layout.tp)
    seconds += job.cluster.latency_s(layout.cp, stride=layout.tp)
    attention = 4 * positions * spec.num_heads * spec.head_dim / layout.tp * seconds_a_flop
    return max(0.0, seconds - attention) if job.on_gpu else seconds


def _scheduled(job: Job, model: Model, parts: list[Stage], micro_batches: int) -> dict[str, float]:
    """Seconds of `micro_batches` through the pipeline: the slowest stage's work, and its waiting.

    On CPU the ranks share the cores: all of their work over all cores, if that is more than what one rank does.
    """
    layout, cores = model.layout, job.cluster.hardware.cores
    slowest = max(parts, key=lambda stage: stage.total)
    compute, messages = micro_batches * slowest.compute_s, micro_batches * slowest.messages_s
    bubble = (layout.pp - 1) / layout.vpp * slowest.total
    if not job.on_gpu:
        ranks = layout.stage_size
        shared = micro_batches * ranks / cores
        everywhere = shared * sum(stage.compute_s for stage in parts)
        talking = shared * sum(stage.messages_s for stage in parts)
        if everywhere + talking > compute + messages + bubble:
            return {"compute": everywhere, "messages": talking}
    return {"compute": compute, "messages": messages, "bubble": bubble}


def _moved_s(job: Job, model: Model, optimizer: bool) -> float:
    """Seconds in which states that wait in host memory come and go again."""
    if not job.config.model.offload:
        return 0.0
    settings, hardware = model.settings, job.cluster.hardware
    states = model_states(
        model.spec,
        model.layout,
        model.layout.coords(0),
        model.head,
        job.config.model.dtype,
        trained=model.trained,
        distributed_optimizer=settings.distributed_optimizer,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        style=job.style,
    )
    sharing = 1 if job.on_gpu else model.layout.world_size
    return 2 * sharing * (states.weights + states.optimizer * optimizer) / (hardware.host_gbs * 1e9)


def forward_time(job: Job, model: Model) -> PhaseTime:
    """A pass without gradients over a step's batch."""
    _, micro_batches = _micro(job, model, backward=False)
    parts = _scheduled(job, model, stages(job, model, backward=False), micro_batches)
    return PhaseTime(
        FORWARD_PHASES[model.role], parts | {"states moved": _moved_s(job, model, optimizer=False)}
    )


def update_time(job: Job, model: Model) -> PhaseTime:
    """All optimizer steps of a model."""
    layout, hardware, plan = model.layout, job.cluster.hardware, model.batching
    _, per_step = _micro(job, model, backward=True)
    by_stage = stages(job, model, backward=True)
    steps = plan.optimizer_steps_per_step
    once = _scheduled(job, model, by_stage, per_step)
    elements = stage_elements(model.spec, layout, model.head, job.style)
    fullest = max(elements)
    reduced = 0.0
    if (replicas := layout.replicas) > 1:
        bandwidth, share = (
            job.cluster.bandwidth(replicas, stride=layout.tp),
            (replicas - 1) / replicas,
        )
        gradients = (
            4 * fullest * share / bandwidth * (1 if model.settings.distributed_optimizer else 2)
        )
        if model.settings.overlap_grad_reduce:  # behind the backward pass of the last micro-batch
            gradients = max(0.0, gradients - max(stage.compute_s for stage in by_stage) * 2 / 3)
        weights = ITEM_BYTES[job.config.model.dtype] * fullest * share / bandwidth
        if (
            model.settings.overlap_param_gather
        ):  # behind the next step's first forward pass, if there is one
            forward = max(stage.compute_s for stage in by_stage) / 3
            weights -= min(weights, forward) * (steps - 1) / steps
        reduced = gradients + weights * model.settings.distributed_optimizer
    owned = fullest / (layout.replicas if model.settings.distributed_optimizer else 1)
    traffic = owned * ADAM_BYTES[job.style] + 8 * fullest  # and gradients zeroed, their norm taken
    if not job.on_gpu:
        traffic *= sum(elements) / fullest * layout.stage_size  # ranks share the memory's bandwidth
    once |= {"gradients over replicas": reduced, "optimizer": traffic / hardware.read_bytes_s}
    parts = {name: seconds * steps for name, seconds in once.items()}
    return PhaseTime(
        f"update_{model.role}", parts | {"states moved": _moved_s(job, model, optimizer=True)}
    )


@cache
def stage_elements(
    spec: ModelSpec, layout: ParallelLayout, head: Head, style: SpecStyle
) -> tuple[int, ...]:
    """Weights of a rank, by pipeline stage."""
    return tuple(
        sum(chunk_sizes(spec, layout, pp, chunk, head, style).total for chunk in range(layout.vpp))
        for pp in range(layout.pp)
    )


def generate_time(job: Job) -> PhaseTime:
    """Prompts once (completions of a prompt share its cache), then tokens as long as the longest or the queue lasts."""
    spec, rollout, hardware = job.spec, job.config.rollout, job.cluster.hardware
    tp, item = rollout.tensor_parallel_size, ITEM_BYTES[rollout.dtype]
    rate = hardware.matmul_flops(rollout.dtype)
    read = hardware.read_bytes_s
    if not job.on_gpu:  # engines share the host
        rate, read = (value / (rollout.engines * tp) for value in (rate, read))
    prompts = job.config.data.train_batch_size / rollout.engines
    tokens = prompts * job.lengths.prompt
    layer = layer_flops(spec, tokens, job.lengths.prompt / 2)
    prefill = (spec.num_layers * layer + head_flops(spec, prompts)) / tp / rate
    sequences = prompts * rollout.n
    context = job.lengths.total / 2
    a_token = kv_bytes_a_token(spec, tp, rollout.dtype)
    room = engine_memory(job).kv_cache / (a_token * max(context, 1.0))
    batch = max(1.0, min(sequences, rollout.max_num_seqs, room))
    decoded = sequences * job.lengths.response
    longest = max(job.lengths.response, job.config.data.max_response_length * (sequences > 1))
    steps = max(longest, decoded / batch)
    a_weight = engine_weight_bytes(spec, rollout) / engine_elements(
        spec, tp, rollout.expert_parallel
    )
    weights = decoder_weights_read(spec, decoded / steps) * a_weight / tp
    cache = decoded * context * a_token
    compute = (
        decoded
        * (spec.num_layers * layer_flops(spec, 1, context) + head_flops(spec, 1))
        / tp
        / rate
    )
    memory = (steps * weights + cache) / read
    messages = 0.0
    if tp > 1:
        size = decoded / steps * spec.hidden_size * item
        ring = 2 * (tp - 1) / tp * size / job.cluster.bandwidth(tp)
        # In a node vLLM's own all-reduce takes half as long as NCCL's.
        latency = hardware.latency_s / 2 if job.cluster.inside(tp) else hardware.network_latency_s
        messages = steps * 2 * spec.num_layers * (ring + latency)
    parts = {"prompts": prefill, "tokens": max(compute, memory) if job.on_gpu else compute + memory}
    host = steps * hardware.decode_overhead_s + decoded * hardware.decode_sequence_s
    kernels = KERNELS["experts" if spec.num_experts else "dense"] * hardware.decode_kernel_s
    layer = hardware.decode_eager_s if rollout.enforce_eager else kernels
    parts |= {"messages": messages, "kernels": steps * spec.num_layers * layer, "host": host}
    return PhaseTime("generate", parts)


def sync_time(job: Job) -> PhaseTime:
    """The bytes of an engine rank through its buckets; between devices those that are not on its own.

    Closed form of the plan's lower bound (docs/resharding.md): beside n training shards an engine rank of g finds
    1/n of the model on its device.
    """
    rollout, hardware = job.config.rollout, job.cluster.hardware
    actor = job.derived.layout
    item = ITEM_BYTES[rollout.dtype]
    needed = engine_elements(job.spec, rollout.tensor_parallel_size, rollout.expert_parallel) * item
    local = 1 / (actor.tp * actor.pp) if job.colocated and job.on_gpu else 0.0
    received = needed * max(0.0, 1 - local * rollout.tensor_parallel_size)
    streams = 1 if job.on_gpu else rollout.tensor_parallel_size  # engines read the same buckets
    buckets = needed / job.sync_bucket_bytes
    parts = {
        "buckets": needed * streams / (hardware.sync_gbs * 1e9) + buckets * hardware.sync_bucket_s
    }
    parts["sleep and wake-up"] = hardware.rest_s * rollout.sleep
    if job.on_gpu:
        parts["between devices"] = received / job.cluster.bandwidth(actor.world_size)
    parts["states moved"] = _moved_s(job, job.models[0], optimizer=False)
    return PhaseTime("sync_weights", parts)


def save_time(job: Job) -> PhaseTime:
    """Weights and optimizer of every trained model, and the policy as a Hugging Face folder, to disk."""
    trainer, written = job.config.trainer, checkpoint_bytes(job)
    if trainer.save_hf == "always":
        written += engine_elements(job.spec, 1, False) * ITEM_BYTES[job.config.model.dtype]
    seconds = 0.0 if trainer.async_save else written / (job.cluster.hardware.disk_gbs * 1e9)
    return PhaseTime("save_checkpoint", {"disk": seconds / trainer.save_freq})
