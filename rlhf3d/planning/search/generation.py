"""Seconds of `generate`: prompts, decoding, and the environments between turns.

Invariant: as `rlhf3d.planning.search.times`. Pure: numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf3d.models.spec import ModelSpec
from rlhf3d.planning.engines import (
    engine_elements,
    engine_memory,
    engine_weight_bytes,
    kv_bytes_a_token,
)
from rlhf3d.planning.job import Job
from rlhf3d.planning.search.flops import decoder_weights_read, head_flops, layer_flops
from rlhf3d.planning.search.phase_time import PhaseTime, ring_bytes
from rlhf3d.units import ITEM_BYTES

KERNELS = {"dense": 10, "experts": 20}
"""Kernels of a decoder layer in a decoding step: a small one takes as long as it takes to start."""


@dataclass(frozen=True)
class Rates:
    """What one engine rank does in a second."""

    flops: float
    read: float
    """Bytes of memory."""


def _rates(job: Job) -> Rates:
    rollout, hardware = job.config.rollout, job.cluster.hardware
    # On CPU engines share the host.
    ranks = 1 if job.on_gpu else rollout.engines * rollout.tensor_parallel_size
    return Rates(hardware.matmul_flops(rollout.dtype) / ranks, hardware.read_bytes_s / ranks)


def generate_time(job: Job) -> PhaseTime:
    """Return the time of a batch's prompts and tokens, and of environments between turns.

    Prompts are computed once, as the completions of a prompt share its cache, and so are turns: the
    cache has all that came before an observation. A batch by itself takes as long as its longest
    completion, or as the queue lasts. In flight it is a share of a stream that never drains.
    """
    prompts, sequences = _per_engine(job)
    steps, decoded = _decoding_steps(job, sequences)
    decoding = _decoding_parts(job, steps, decoded)
    again = waits = longest = 0.0
    if job.config.rollout.update == "in_flight":
        again, busy = _caches_again_s(job), sum(decoding.values())
        waits = max(0.0, _environments_queue_s(job) - busy)
        longest = _longest_s(job) + job.config.rollout.max_staleness * again
    elif job.config.environment.enabled:
        # Trajectories wait beside one another, as many as may live at once.
        waits = max(_longest_calls_s(job), _environments_queue_s(job))
    return PhaseTime(
        "generate",
        {
            "prompts": _prompts_s(job, prompts),
            "observations": _observations_s(job, sequences),
            **decoding,
            "caches again": again,
            "environments": waits,
        },
        longest,
    )


def _prompts_s(job: Job, prompts: float) -> float:
    tokens = job.lengths.prompt
    # Causal: a prompt's token attends to half of the prompt on average.
    return _prefill_s(job, prompts, tokens, tokens / 2)


def _observations_s(job: Job, sequences: float) -> float:
    lengths = job.lengths
    each = lengths.observed / max(lengths.turns - 1, 1.0)
    return _prefill_s(job, sequences * (lengths.turns - 1), each, _mean_context(job))


def _per_engine(job: Job) -> tuple[float, float]:
    """Prompts and sequences of a batch that an engine gets."""
    prompts = job.config.data.train_batch_size / job.config.rollout.engines
    return prompts, prompts * job.config.rollout.n


def _mean_context(job: Job) -> float:
    """Tokens that a sampled one attends to: the prompt and, on average, half of the response."""
    return job.lengths.prompt + job.lengths.response / 2


def _decoding_parts(job: Job, steps: float, decoded: float) -> dict[str, float]:
    """Seconds of `steps` decoding steps of one engine, which decode `decoded` tokens in all."""
    spec, rollout, hardware = job.spec, job.config.rollout, job.cluster.hardware
    tp, rates, context = rollout.tensor_parallel_size, _rates(job), _mean_context(job)
    token = spec.num_layers * layer_flops(spec, 1, context) + head_flops(spec, 1)
    compute = decoded * token / tp / rates.flops
    elements = engine_elements(spec, tp, rollout.expert_parallel)
    # In FP8 the mean over bytes and what stays whole.
    weight_bytes = engine_weight_bytes(spec, rollout) / elements
    # decoded / steps: sequences in a step, on average.
    weights = decoder_weights_read(spec, decoded / steps) * weight_bytes / tp
    cache_bytes = decoded * context * kv_bytes_a_token(spec, tp, rollout.dtype)
    memory = (steps * weights + cache_bytes) / rates.read
    kernels = KERNELS["experts" if spec.num_experts else "dense"] * hardware.decode_kernel_s
    # Without CUDA graphs a layer takes as long as the host takes to launch its kernels.
    if rollout.enforce_eager:
        kernels = hardware.decode_eager_s
    return {
        # A GPU reads memory while it computes (roofline); on CPU the two are added up.
        "tokens": max(compute, memory) if job.on_gpu else compute + memory,
        "messages": steps * _decoding_messages_s(job, decoded / steps),
        "kernels": steps * spec.num_layers * kernels,
        "host": steps * hardware.decode_overhead_s + decoded * hardware.decode_sequence_s,
    }


def _prefill_s(job: Job, requests: float, tokens: float, context: float) -> float:
    """Seconds for requests with that many tokens, each of which attends to `context` others."""
    flops = _prefill_flops(job.spec, requests, tokens, context)
    return flops / job.config.rollout.tensor_parallel_size / _rates(job).flops


def _prefill_flops(spec: ModelSpec, requests: float, tokens: float, context: float) -> float:
    """Requests with that many tokens to compute, each of which attends to `context` others."""
    layers = spec.num_layers * layer_flops(spec, requests * tokens, context)
    return layers + head_flops(spec, requests)  # the last token's logits


def _environments_queue_s(job: Job) -> float:
    """Seconds in which as many environments as may live at once answer all calls of a batch."""
    environment, lengths = job.config.environment, job.lengths
    if not environment.enabled:
        return 0.0
    calls = job.derived.sequences_per_step * lengths.turns
    return calls / environment.max_concurrent * lengths.environment_s


def _longest_calls_s(job: Job) -> float:
    """Seconds of the calls of a batch's longest trajectory: all turns, and the slowest call."""
    environment, lengths = job.config.environment, job.lengths
    if not environment.enabled:
        return 0.0
    slower = lengths.slowest_call_s - lengths.environment_s
    return environment.max_turns * lengths.environment_s + slower


def running_sequences(job: Job) -> float:
    """Return the sequences that run in an engine while a batch is trained on, in flight.

    Of the (k + 1) batches that admission allows, one is in training. Trajectories with an
    environment are no more than the environments that may live at once.
    """
    rollout, environment = job.config.rollout, job.config.environment
    running = rollout.max_staleness * job.derived.sequences_per_step
    if environment.enabled:
        running = min(running, environment.max_concurrent)
    return max(1.0, running / rollout.engines)


def _longest_s(job: Job) -> float:
    """Seconds from a batch's longest trajectory being asked for to its end, in flight.

    It matters where a step waits for it. Then between k and k + 1 batches are asked for while it
    lasts, so that engines decode k + 1/2 times as many sequences as a batch by itself has on
    average. It may wait for its turn first, until those before it have left the decoding steps.
    """
    rollout, sampled = job.config.rollout, job.lengths.sampled
    _, sequences = _per_engine(job)
    longest = _longest_sampled(job, sequences)
    at_once = (rollout.max_staleness + 0.5) * sequences * sampled / longest
    batch = decoding_batch(job, at_once)
    waiting = max(0.0, at_once - batch) / batch * sampled
    return (waiting + longest) * _decoding_step_s(job, batch) + _longest_calls_s(job)


def _decoding_step_s(job: Job, batch: float) -> float:
    """Seconds of one decoding step of `batch` sequences."""
    return sum(_decoding_parts(job, 1.0, batch).values())


def _caches_again_s(job: Job) -> float:
    """Seconds in which running requests' keys and values are computed under new weights.

    Once a step. On average half of a response is there; prompts are shared in their groups.
    """
    lengths, rollout = job.lengths, job.config.rollout
    running = running_sequences(job)
    # A request that has not begun has nothing to compute again; one between turns has.
    if not job.config.environment.enabled:
        running = decoding_batch(job, running)
    written = lengths.response / 2
    prompts = _prefill_s(job, running / rollout.n, lengths.prompt, lengths.prompt / 2)
    return prompts + _prefill_s(job, running, written, lengths.prompt + written / 2)


def decoding_batch(job: Job, sequences: float) -> float:
    """Return how many of an engine's sequences it decodes at once: slots, and what the cache holds.

    Of sequences with a prompt and half of a response.
    """
    rollout = job.config.rollout
    a_token = kv_bytes_a_token(job.spec, rollout.tensor_parallel_size, rollout.dtype)
    cached = engine_memory(job).kv_cache / (a_token * max(_mean_context(job), 1.0))
    return max(1.0, min(sequences, rollout.max_num_seqs, cached))


def _decoding_steps(job: Job, sequences: float) -> tuple[float, float]:
    """Decoding steps of an engine for its part of a batch, and tokens that it decodes in them."""
    decoded = sequences * job.lengths.sampled
    if job.config.rollout.update == "in_flight":
        return decoded / decoding_batch(job, running_sequences(job)), decoded
    # The longest completion takes a step a token; a queue lasts until all are decoded.
    longest = _longest_sampled(job, sequences)
    return max(longest, decoded / decoding_batch(job, sequences)), decoded


def _longest_sampled(job: Job, sequences: float) -> float:
    """Tokens that the policy writes of an engine's longest completion."""
    sampled, response = job.lengths.sampled, job.lengths.response
    if sequences <= 1:
        return sampled
    # One of several completions is as long as it may be.
    return max(sampled, sampled / response * job.config.data.max_response_length)


def _decoding_messages_s(job: Job, batch: float) -> float:
    """Sums over an engine's ranks in one decoding step of `batch` sequences."""
    rollout, hardware = job.config.rollout, job.cluster.hardware
    tp = rollout.tensor_parallel_size
    if tp == 1:
        return 0.0
    size = batch * job.spec.hidden_size * ITEM_BYTES[rollout.dtype]
    ring = ring_bytes(tp, size) / job.cluster.bandwidth(tp)
    # In a node vLLM's own all-reduce takes half as long as NCCL's.
    latency = hardware.latency_s / 2 if job.cluster.inside(tp) else hardware.network_latency_s
    # Two all-reduces a layer, after attention and after the MLP.
    return 2 * job.spec.num_layers * (ring + latency)
