"""Starting vLLM: one tensor-parallel rank of an engine, in this process.

Invariant: an engine's ranks get the same arguments, whatever a process finds in its environment;
what differs between ranks is which one it is, where they meet and its address.
Runs in: engine rank, or the process of `rlhf3d evaluate`. vLLM and torch are imported inside, after
the environment that they read is set.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.imports import quick_imports
from rlhf3d.models.spec import architecture
from rlhf3d.parallel.meeting import host_meeting
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_patches import ask_driver_for_peers, meet_at
from rlhf3d.units import GIB

MEETING_S = 300.0
"""Deadline for the ranks of an engine to meet."""
WORKER_EXTENSION = "rlhf3d.rollout.worker_extension.WeightSyncWorker"
ZEROS = "rlhf3d_zeros"
"""What vLLM calls weights of zeros, see `register_zeros`."""


def start_vllm(
    settings: EngineSettings, rank: int, threads: int, meeting: tuple[str, int] | None, host: str
) -> Any:
    """vLLM's `LLM`, as rank `rank` of an engine, with `threads` CPU threads.

    An engine's ranks, where there are several, meet at `meeting` (address, port) and find this one
    at the address `host`.
    """
    set_environment(settings, threads)
    if settings.rollout.tensor_parallel_size > 1:
        assert meeting is not None, "the ranks of an engine must know where to meet"
        _prepare_to_meet(settings, rank, meeting, host)
    with quick_imports():
        import torch

        # Where torch was imported before, it has read OMP_NUM_THREADS before it was set.
        torch.set_num_threads(threads)
        from torch._dynamo import config as dynamo
        from vllm import LLM

        from rlhf3d.models.hf_io import model_view

        if _load_format(settings) == ZEROS:
            register_zeros()
        kernels = kernel_arguments(settings)
    # As with the number of threads.
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        dynamo.disable = True
    path, own = settings.model_path, settings.load_weights
    # By its own rules vLLM would take weights that transformers does not from a folder that holds
    # more than the model.
    with model_view(path) if own else nullcontext(path) as folder:
        llm = LLM(str(folder), **llm_arguments(settings), **kernels)
    if meeting is not None:
        _forget_shared_memory(meeting[1])
    return llm


def set_environment(settings: EngineSettings, threads: int) -> None:
    """Set what vLLM and torch read; before vLLM is imported, which sets up its logging from it."""
    on_cpu, eager = settings.platform.kind == "cpu", settings.rollout.enforce_eager is True
    os.environ.update(_environment(on_cpu, eager))
    os.environ.update(settings.platform.thread_settings(threads))
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes


def _prepare_to_meet(
    settings: EngineSettings, rank: int, meeting: tuple[str, int], host: str
) -> None:
    """What the ranks of one engine need before vLLM starts in them."""
    # After the other settings, whose VLLM_HOST_IP it replaces.
    os.environ.update(_rank_environment(rank, settings.rollout.tensor_parallel_size, host))
    # Rank 0's process owns the port and serves there; in the others this does nothing.
    host_meeting(meeting[1], MEETING_S)
    meet_at(rank, *meeting)
    if settings.platform.kind != "cpu":
        ask_driver_for_peers()


def llm_arguments(settings: EngineSettings) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, besides the model's folder."""
    rollout, on_cpu = settings.rollout, settings.platform.kind == "cpu"
    # Logits in fp32 on GPUs, as the trainer's: rounded to bfloat16 they are off by up to 0.06.
    head_dtype = "model" if on_cpu else "float32"
    quantization = None if rollout.quantization == "none" else rollout.quantization
    of_platform = _cpu_arguments(settings) if on_cpu else _gpu_arguments(rollout)
    return {
        # By itself vLLM would look for files in the format of Mistral first.
        "config_format": "hf",
        "hf_overrides": partial(_complete_config, head_dtype=head_dtype),
        "dtype": rollout.dtype,
        "quantization": quantization,
        "load_format": _load_format(settings),
        "skip_tokenizer_init": not settings.stops.strings,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "distributed_executor_backend": _executor(rollout),
        "enable_expert_parallel": rollout.expert_parallel,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager,
        "seed": settings.seed,
        # The samples of a prompt share its keys and values.
        "enable_prefix_caching": True,
        # Of the distribution that tokens are drawn from: after temperature, top-p and top-k.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER_EXTENSION,
        **of_platform,
    }


def kernel_arguments(settings: EngineSettings) -> dict[str, Any]:
    """More of them, which this process's vLLM is prepared for here."""
    # Compiled, torch's operations become one kernel too.
    if settings.platform.kind != "cpu" or settings.rollout.enforce_eager is not True:
        return {}
    from rlhf3d.rollout.vllm_kernels import cpu_kernels

    return cpu_kernels()


def _load_format(settings: EngineSettings) -> str:
    """Which weights an engine starts from: its folder's, or some that a sync will replace."""
    if settings.load_weights:
        return "safetensors"
    # What is quantized must not be zero, and GPUs draw random numbers in no time.
    drawn = settings.platform.kind != "cpu" or settings.rollout.quantization != "none"
    return "dummy" if drawn else ZEROS


def register_zeros() -> None:
    """Have vLLM know `ZEROS`.

    Of the random numbers of its own format a core draws 150 million a second.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class ZeroLoader(DummyModelLoader):
        def load_weights(self, model: Any, model_config: Any) -> None:
            for tensor in model.state_dict().values():
                tensor.zero_()

    register_model_loader(ZEROS)(ZeroLoader)


def _executor(rollout: RolloutConfig) -> str | None:
    """Who runs vLLM's workers: with several ranks each process is a worker of its own."""
    return "external_launcher" if rollout.tensor_parallel_size > 1 else None


def _cpu_arguments(settings: EngineSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "kv_cache_memory_bytes": int(settings.rollout.kv_cache_gib * GIB),
        # For a prompt cut into chunks vLLM takes back a draw of the request's generator, which only
        # CUDA's can.
        "enable_chunked_prefill": False,
        # Without chunks, one step must take the longest prompt whole.
        "max_num_batched_tokens": max(4096, settings.max_model_len),
    }
    if settings.platform.kv_block_tokens is not None:
        arguments["block_size"] = settings.platform.kv_block_tokens
    return arguments


def _gpu_arguments(rollout: RolloutConfig) -> dict[str, Any]:
    return {
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        # Of vLLM's expert kernels on CUDA, Triton's keep weights where the weight sync writes them.
        "moe_backend": "triton",
        "enable_sleep_mode": rollout.sleep,
    }


def _complete_config(config: Any, head_dtype: str) -> Any:
    """Name the class of the model's type, and the dtype of the logits.

    By `architectures` vLLM would take another class, or none where that is null.
    """
    config.architectures = [architecture(config.model_type, "CausalLM")]
    config.head_dtype = head_dtype
    return config


def _environment(on_cpu: bool, enforce_eager: bool) -> dict[str, str]:
    settings = {
        # Core and worker in this process: external_launcher demands it, and `_on_worker` passes
        # objects that are not serialized.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        # vLLM takes YaRN's window from max_position_embeddings alone; ours was checked against
        # the model's.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    if on_cpu:
        # "auto" would reserve a core and bind every engine of this host to the same ones.
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if on_cpu and enforce_eager:
        # Parts of vLLM's sampler would otherwise be compiled at the first request: that takes
        # seconds, and a C++ compiler on the user's machine.
        settings["TORCH_COMPILE_DISABLE"] = "1"
    return settings


def _rank_environment(rank: int, ranks: int, host: str) -> dict[str, str]:
    """What torchrun would set, each rank seeing one device, and this one's address."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": "1",
        "VLLM_HOST_IP": host,
        # torch's symmetric memory would fail: to it, processes that each have a device 0 are on
        # one device.
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    }


def _forget_shared_memory(port: int) -> None:
    """Remove the files that vLLM's CPU ranks share, now that all have opened them.

    Without a name the memory is freed when the processes end, however they do.
    """
    # vLLM names them by the port of the init method.
    for file in Path("/dev/shm").glob(f"{port}-*-cpushm_*"):
        file.unlink(missing_ok=True)
