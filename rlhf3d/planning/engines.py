"""Memory of a vLLM rank: weights, a forward pass, and what is left for the KV cache.

Invariant: weights are those of the engine's own weight table. Pure: no torch, no vLLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.models.engine_weights import check_quantization, engine_params, engine_vocab_size
from rlhf3d.models.spec import ModelSpec
from rlhf3d.planning.job import Job
from rlhf3d.units import GIB, ITEM_BYTES

GRAPHS_GIB = 1.0
"""CUDA graphs and compiled code of an engine that is not eager (rule of thumb)."""


@dataclass(frozen=True)
class EngineMemory:
    """One engine rank, bytes."""

    weights: int
    packed: int
    """Copies that CPU kernels compute with."""
    activations: int
    kv_cache: int
    """Room left for keys and values; may be 0."""
    kv_bytes_a_token: int
    max_model_len: int
    outside: int = 0
    """Not in rollout.gpu_memory_utilization: vLLM measures what is free when its CUDA context and
    communicators are there."""
    missing: int = 0
    """Bytes missing for one sequence of the longest length: without it vLLM does not start."""

    @property
    def total(self) -> int:
        """All but `outside`."""
        return self.weights + self.packed + self.activations + self.kv_cache

    @property
    def one_sequence(self) -> int:
        """Keys and values of a sequence of the longest length."""
        return self.kv_bytes_a_token * self.max_model_len

    @property
    def sequences(self) -> int:
        """Sequences of the longest length whose keys and values fit at once."""
        return self.kv_cache // self.one_sequence


@cache
def engine_elements(spec: ModelSpec, tensor_parallel_size: int, expert_parallel: bool) -> int:
    """Weights of one rank; the ranks of an engine have equally many."""
    table = engine_params(spec, tensor_parallel_size, 0, expert_parallel)
    return sum(math.prod(param.shape) for param in table)


def engine_weight_bytes(spec: ModelSpec, rollout: RolloutConfig) -> int:
    """Weights of one rank; in FP8 the matrices of the layers are bytes, with an fp32 scale a row.

    Raises ValueError as `check_quantization` does.
    """
    item = ITEM_BYTES[rollout.dtype]
    size = engine_elements(spec, rollout.tensor_parallel_size, rollout.expert_parallel) * item
    check_quantization(spec, rollout.quantization)
    if rollout.quantization == "none":
        return size
    # vLLM's linear layers: all the matrices of these names, while embedding and head stay whole.
    shapes = [
        p.shape
        for p in engine_params(spec, rollout.tensor_parallel_size, 0)
        if p.name.endswith("_proj.weight")
    ]
    return size + sum(4 * rows - (item - 1) * rows * columns for rows, columns in shapes)


def kv_bytes_a_token(spec: ModelSpec, tensor_parallel_size: int, dtype: str) -> int:
    """Keys and values of a token in all layers of one rank; a head is never cut."""
    heads = max(1, spec.num_kv_heads // tensor_parallel_size)
    return 2 * spec.num_layers * heads * spec.head_dim * ITEM_BYTES[dtype]


def engine_memory(job: Job) -> EngineMemory:
    """One engine rank of a job."""
    config, spec, hardware = job.config.rollout, job.spec, job.cluster.hardware
    tp, item = config.tensor_parallel_size, ITEM_BYTES[config.dtype]
    weights = engine_weight_bytes(spec, config)
    length = job.derived.max_sequence_length
    # The most tokens of one forward pass: on CPU as `rollout.vllm_start` sets it.
    batched = (
        min(hardware.batched_tokens, config.max_num_seqs * length)
        if job.on_gpu
        else max(4096, length)
    )
    ffn = spec.moe_ffn_size * spec.experts_per_token if spec.num_experts else spec.ffn_size
    # vLLM pads the vocabulary before its ranks share it out.
    rows = engine_vocab_size(spec.vocab_size) // tp
    activations = (
        batched * (4 * spec.hidden_size + 3 * ffn // tp) * item + 3 * config.max_num_seqs * rows * 4
    )
    a_token = kv_bytes_a_token(spec, tp, config.dtype)
    if not job.on_gpu:
        # On CPU the KV cache has a size of its own; activations are no part of it.
        room = int(config.kv_cache_gib * GIB)
        return EngineMemory(
            weights, weights, activations, room, a_token, length, 0, max(0, a_token * length - room)
        )
    assert hardware.memory_gib is not None
    activations += 0 if config.enforce_eager else int(GRAPHS_GIB * GIB)
    # As in vLLM, the KV cache gets what is left of the share after weights and a forward pass.
    room = int(config.gpu_memory_utilization * hardware.memory_gib * GIB) - weights - activations
    outside = int((hardware.engine_context_gib + hardware.engine_comm_gib * (tp > 1)) * GIB)
    missing = max(0, a_token * length - room)
    return EngineMemory(weights, 0, activations, max(0, room), a_token, length, outside, missing)
