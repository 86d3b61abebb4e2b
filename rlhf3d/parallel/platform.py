"""The one seam between CPU and CUDA: devices, backends, layer specs and fused kernels.

Invariant: no other module asks which device it runs on; it asks its `Platform`. Objects are frozen
and picklable. Torch and Megatron are imported inside methods, so that the command line can make one
without them.
"""

from __future__ import annotations

import importlib.util
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import megatron_patches
from rlhf3d import machine
from rlhf3d.machine import loaded_from
from rlhf3d.observability.profile.clock import Clock, HostClock
from rlhf3d.parallel import host_allocator
from rlhf3d.units import GIB, KIB

if TYPE_CHECKING:
    import torch

    from rlhf3d.parallel.layout import PlatformKind, SpecStyle, TrainingDtype

Backend = Literal["gloo", "nccl", "nccl_rules"]
"""Backends of torch.distributed; the last is `rlhf3d.parallel.nccl_rules`."""
SPINS = 2000
"""How often a thread of OpenMP on CPU looks for more work before it sleeps: for about as long as it
takes to wake it. By itself it looks 300,000 times, several milliseconds after every operation, on a
core that another rank or engine could use."""


@dataclass(frozen=True)
class Platform(ABC):
    """What differs between CPU and CUDA, behind one interface."""

    reason: str
    """Why this platform was chosen, as text."""

    kind: ClassVar[PlatformKind]
    """cpu or cuda."""
    dist_backend: ClassVar[Backend]
    """Backend of torch.distributed."""
    spec_style: ClassVar[SpecStyle]
    """Whose parameter names the layers of `layer_spec` have."""
    resource: ClassVar[str]
    """Ray resource that one training rank occupies."""
    head_block_elements: ClassVar[int]
    """Logits of a rank that exist at once in the vocabulary head."""
    one_device_a_rank: ClassVar[bool]
    """Whether each training rank has its own device; otherwise a node's ranks share its memory."""
    weights_on_gpu: ClassVar[bool]
    """Whether weights travel in GPU memory: by CUDA IPC on one device, by NCCL between devices."""
    sync_bucket_mib: ClassVar[int]
    """What null means for `rollout.sync_bucket_mib`."""
    measures_cache: ClassVar[bool]
    """Whether vLLM measures the device's free memory for its cache: nothing else may load there
    meanwhile."""
    cache_setting: ClassVar[Literal["kv_cache_gib", "gpu_memory_utilization"]]
    """The setting that sizes an engine's KV cache; the other has no effect."""
    eager_engines: ClassVar[bool]
    """What auto means for `rollout.enforce_eager`: on CPU compiling takes a minute, and needs a C++
    compiler."""

    kv_block_tokens: ClassVar[int | None] = None
    """Size of the prefix cache's blocks; None: vLLM's own."""
    sleep_forgets: ClassVar[bool] = False
    """Whether an engine that sleeps fills its weights with NaN, since the platform frees none."""

    def environment(self, process: Literal["trainer", "engine"], dtype: str) -> dict[str, str]:
        """Return the variables that the process must start with: libraries read them once."""
        return {}

    def thread_settings(self, threads: int) -> dict[str, str]:
        """Return the variables of a process with that many CPU threads.

        It must have them before it loads torch, whose OpenMP reads them once.
        """
        return {"OMP_NUM_THREADS": str(threads)}

    @abstractmethod
    def device(self) -> torch.device:
        """Return the device of this process."""

    def pretended_devices(self, needed: int) -> int | None:
        """Return the number of GPUs to give Ray on this machine; None: those it finds."""
        return None

    def prepare_worker(self, threads: int) -> None:
        """Set up a worker before it imports Megatron: environment, threads, device, patches."""
        os.environ.update(self.thread_settings(threads))
        import torch

        torch.set_num_threads(threads)
        self._bind_device()
        megatron_patches.apply(self.kind)

    @abstractmethod
    def _bind_device(self) -> None:
        """Make the rank's device current in this process."""

    @abstractmethod
    def layer_spec(self, qk_layernorm: bool, num_experts: int = 0) -> Any:
        """Return Megatron's `ModuleSpec` of a decoder layer with RMSNorm; dense without experts."""

    @abstractmethod
    def transformer_config_overrides(self) -> dict[str, Any]:
        """Return the fields of Megatron's `TransformerConfig` that depend on the platform."""

    @property
    @abstractmethod
    def fast_dtype(self) -> TrainingDtype:
        """What auto means for `model.dtype` and `rollout.dtype`: bfloat16 where it is fast."""

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a @ b in fp32, where possible never rounded to the dtype of `a` and `b`."""
        return (a @ b).float()

    def add_product(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a @ b to `total`, which is in fp32; see `product`."""
        total += a @ b

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy a host tensor to a device, without waiting for the device's other work."""
        return tensor.to(device)

    def prepare_optimizer(self, groups: Iterable[dict[str, Any]]) -> None:
        """Choose the fastest kernel for a new optimizer's steps, in its parameter groups."""
        return

    @abstractmethod
    def free_cached(self) -> None:
        """Release the device memory that torch keeps for its next tensors to other processes."""

    @abstractmethod
    def memory_gib(self) -> float:
        """Return the memory, GiB, of the host on CPU (all ranks share it), of one GPU on CUDA."""

    def clock(self) -> Clock:
        """What tells when a training rank has come to a place in its work."""
        return HostClock()

    @abstractmethod
    def peak_gib(self) -> float:
        """Return the most memory that this process has had so far, GiB.

        On CPU its resident set, on CUDA what torch has reserved of the device.
        """


@dataclass(frozen=True)
class CPUPlatform(Platform):
    """Processes with gloo; Megatron's local layers with torch's own attention."""

    kind = "cpu"
    dist_backend: ClassVar[Backend] = "gloo"
    spec_style = "local"
    resource = "CPU"
    head_block_elements = 1 << 21  # small enough to stay in the cache
    one_device_a_rank = False
    weights_on_gpu = False
    sync_bucket_mib = 64
    measures_cache = False
    cache_setting = "kv_cache_gib"
    eager_engines = True
    # The smallest that vLLM's CPU kernels take. Only full blocks are shared: in vLLM's own, of 128
    # tokens, most prompts end before one is full, and each completion would compute its prompt.
    kv_block_tokens = 32

    def thread_settings(self, threads: int) -> dict[str, str]:
        settings = super().thread_settings(threads)
        # The user's own choice stands.
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            settings["GOMP_SPINCOUNT"] = str(SPINS)
        return settings

    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def prepare_worker(self, threads: int) -> None:
        super().prepare_worker(threads)
        from rlhf3d.parallel.plain_optimizers import leave_out_compiler

        leave_out_compiler()

    def _bind_device(self) -> None:
        """Keep freed memory as GPUs do; a CPU rank's cores follow from its thread count."""
        host_allocator.keep_freed()

    def layer_spec(self, qk_layernorm: bool, num_experts: int = 0) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from rlhf3d.parallel.attention import SDPACoreAttention

        spec = get_gpt_layer_local_spec(
            num_experts=num_experts or None, normalization="RMSNorm", qk_layernorm=qk_layernorm
        )
        spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
        if num_experts:
            # In checkpoints Megatron names the norms of dense layers as Transformer Engine does,
            # but not the norm before a router.
            del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        return spec

    def transformer_config_overrides(self) -> dict[str, Any]:
        return _fusions(False) | {"use_cpu_initialization": True}

    @property
    def fast_dtype(self) -> TrainingDtype:
        # Emulated bfloat16 is several times slower than float32; with AMX or AVX512-BF16 it is
        # faster.
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
        return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"

    def prepare_optimizer(self, groups: Iterable[dict[str, Any]]) -> None:
        # One pass over weights, gradients and moments. torch's default makes one for each
        # operation, and temporary tensors of the same size.
        for group in groups:
            group["fused"] = True

    def free_cached(self) -> None:
        host_allocator.give_back_freed()

    def memory_gib(self) -> float:
        return machine.memory_gib()

    def peak_gib(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GIB


@dataclass(frozen=True)
class CUDAPlatform(Platform):
    """GPUs with NCCL; Transformer Engine's layers."""

    kind = "cuda"
    dist_backend = "nccl"
    spec_style = "te"
    resource = "GPU"
    head_block_elements = 1 << 27  # fewer, larger products: half a GiB of logits
    one_device_a_rank = True
    weights_on_gpu = True
    sync_bucket_mib = 256
    measures_cache = True
    cache_setting = "gpu_memory_utilization"
    eager_engines = False

    def environment(self, process: Literal["trainer", "engine"], dtype: str) -> dict[str, str]:
        allocator = _allocator_options()
        variables = {"PYTORCH_ALLOC_CONF": allocator, "PYTORCH_CUDA_ALLOC_CONF": allocator}
        if process == "trainer":
            # One queue keeps the launch order that Megatron relies on where it overlaps
            # tensor-parallel communication.
            variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        if dtype == "float32":
            # Otherwise Transformer Engine's products and vLLM's attention would be in TF32, which
            # has 10 bits of each input.
            variables |= {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}
        return variables

    def device(self) -> torch.device:
        import torch

        # Ray shows a worker only its own GPU, which then has index 0.
        return torch.device("cuda", 0)

    def _bind_device(self) -> None:
        import torch

        use_torchs_cudnn()
        torch.cuda.set_device(self.device())

    def layer_spec(self, qk_layernorm: bool, num_experts: int = 0) -> Any:
        if importlib.util.find_spec("transformer_engine") is None:
            raise ValueError(
                "cluster.platform=cuda needs Transformer Engine, which is not installed: "
                "pip install 'transformer-engine[pytorch]', or set cluster.platform=cpu"
            )
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts or None,
            moe_grouped_gemm=num_experts > 0,
            qk_layernorm=qk_layernorm,
        )

    def transformer_config_overrides(self) -> dict[str, Any]:
        # On the host each rank would make complete float32 matrices first.
        return _fusions(True) | {"use_cpu_initialization": False}

    @property
    def fast_dtype(self) -> TrainingDtype:
        return "bfloat16"

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        import torch

        # A logit of 16 to 32 rounded to bfloat16 is off by up to 0.06.
        return torch.mm(a, b, out_dtype=torch.float32)

    def add_product(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        import torch

        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        # From pageable memory the copy would wait for all kernels launched before it.
        return tensor.pin_memory().to(device, non_blocking=True)

    def free_cached(self) -> None:
        import torch

        torch.cuda.empty_cache()

    def memory_gib(self) -> float:
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory) / GIB

    def clock(self) -> Clock:
        from rlhf3d.parallel.device_clock import DeviceClock

        return DeviceClock()

    def peak_gib(self) -> float:
        import torch

        return float(torch.cuda.max_memory_reserved()) / GIB


def _allocator_options() -> str:
    """Return the user's options of torch's allocator, without expandable segments.

    Raises ValueError where the user turns those on: memory of theirs cannot be shared.
    """
    options = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    parts = [part.strip() for part in options.split(",") if part.strip()]
    if any(part.lower().replace(" ", "") == "expandable_segments:true" for part in parts):
        raise ValueError(
            f"PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF) = {options}: weights go from trainer "
            "to engine in memory that both have open, which expandable segments do not allow; "
            "remove expandable_segments:True from it"
        )
    kept = [part for part in parts if "expandable_segments" not in part]
    # Explicit, since another node may turn them on in its own environment.
    return ",".join([*kept, "expandable_segments:False"])


def _fusions(enabled: bool) -> dict[str, Any]:
    """Megatron's kernel fusions: they are CUDA or Transformer Engine code."""
    names = (
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "apply_rope_fusion",
    )
    return dict.fromkeys((*names, "gradient_accumulation_fusion", "moe_permute_fusion"), enabled)


def use_torchs_cudnn() -> None:
    """Make Transformer Engine, not yet imported, open the cuDNN that torch has loaded.

    By itself it would open one of the system next to it.
    """
    folder = loaded_from("libcudnn")
    if folder is not None:
        os.environ["CUDNN_HOME"] = str(folder)


def choose_platform(requested: str) -> Platform:
    """Return the platform for `cluster.platform`: auto, cpu, cuda or as_gpu.

    Raises ValueError when this machine does not have it.
    """
    if requested == "cpu":
        return CPUPlatform(reason="cluster.platform=cpu")
    if requested == "as_gpu":
        from rlhf3d.parallel.as_gpu import AsGPUPlatform

        return AsGPUPlatform(reason="cluster.platform=as_gpu")
    if requested not in ("auto", "cuda"):
        raise ValueError(f"cluster.platform={requested!r} is not one of auto, cpu, cuda, as_gpu")
    import torch

    if torch.cuda.is_available():
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        return CUDAPlatform(reason=f"cluster.platform={requested}, found {gpus}")
    cpu_build = f"torch {torch.__version__} is a CPU build"
    why_not = "torch sees no GPU" if torch.version.cuda else cpu_build
    if requested == "cuda":
        raise ValueError(
            f"cluster.platform=cuda, but {why_not}: set cluster.platform=cpu, or run on a machine "
            "with a GPU"
        )
    return CPUPlatform(reason=f"cluster.platform=auto, {why_not}")
