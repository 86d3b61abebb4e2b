"""Transformer Engine without a GPU: its own Python, its compiled kernels replaced by a few lines of torch each.

Invariant: everything above the kernels is Transformer Engine's and Megatron's released code; a kernel that has no
stand-in here fails when it is called. Import before Megatron, in a process of its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patches import cpu_cuda
from megatron_patches.device import retarget

PACKAGE = "transformer_engine"


class DType(IntEnum):
    """Element types."""

    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


class FusedAttention(IntEnum):
    """cuDNN's attention kernels."""

    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Absent:
    """A name that modules mention when they are imported, and that nobody may call."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self._name} has no stand-in")


class _Names(types.ModuleType):
    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *_: Any) -> tuple:
    """Normalised rows, nothing, and 1 / root mean square."""
    assert out is None and quantizer is None
    rsigma = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * rsigma[:, None] * weight.float()).to(x.dtype), None, rsigma


def rmsnorm_bwd(dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight."""
    normal, scaled = x.float() * rsigma[:, None], dy.float() * weight.float()
    dx = rsigma[:, None] * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normal).sum(0).to(weight.dtype)


def generic_gemm(A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantizer: Any, dtype: Any,
                 bias: Any, bias_dtype: Any, gelu: bool, *rest: Any, **_: Any) -> tuple:  # fmt: skip
    """B · Aᵀ ("TN"), B · A ("NN") or Bᵀ · A ("NT"), rows of the last dimension."""
    assert bias is None and not gelu and quantizer is None
    accumulate = rest[4]
    a = A.flatten(0, -2) if A.dim() > 2 else A
    b = B.flatten(0, -2) if transb and B.dim() > 2 else B
    product = (b.t() if transb else b) @ (a.t() if transa else a)
    if out is None:
        return product, None, None, None
    out.copy_(out + product if accumulate else product)
    return out, None, None, None


def te_general_grouped_gemm(A: list, transa: bool, B: list, transb: bool, out: list, dtype: Any, splits: Any,
                            bias: Any, bias_dtype: Any, single_output: bool, gelu: Any, grad: bool, workspaces: Any,
                            size: int, accumulate: bool, *_: Any) -> Any:  # fmt: skip
    """A product a group, into one tensor after the other or the rows of one."""
    products = [(b.t() if transb else b) @ (a.t() if transa else a) for a, b in zip(A, B, strict=True)]
    targets = out[0].split(splits) if single_output else out
    for target, product in zip(targets, products, strict=True):
        target.copy_(target + product if accumulate else product)
    return bias


def _angles(freqs: Tensor, lengths: Sequence[int], cp: int, rank: int) -> Tensor:
    """[t, 1, d] angles of packed rows of these (whole) lengths, or of the share that a context-parallel rank holds."""
    parts = []
    for length in lengths:
        chunks = freqs[:length, 0].chunk(2 * cp) if cp > 1 else (freqs[:length, 0],)
        parts += [chunks[rank], chunks[-1 - rank]] if cp > 1 else chunks
    return torch.cat(parts)


def _rotate(t: Tensor, freqs: Tensor, cu_seqlens: Tensor | None, cp: int, rank: int, sign: int) -> Tensor:
    packed = cu_seqlens is not None
    angles = _angles(freqs, cu_seqlens.diff().tolist(), cp, rank) if packed else freqs[: t.shape[0]]
    x = t.float()
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x * angles.cos() + sign * turned * angles.sin()).to(t.dtype)


def fused_rope_forward(t: Tensor, freqs: Tensor, start: Any, layout: Any, interleaved: bool, cu_seqlens: Tensor | None,
                       cp: int, rank: int) -> Tensor:  # fmt: skip
    """Rotated queries or keys, sbhd or packed."""
    assert start is None and not interleaved
    return _rotate(t, freqs, cu_seqlens, cp, rank, 1)


def fused_rope_backward(t: Tensor, freqs: Tensor, start: Any, layout: Any, interleaved: bool, cu_seqlens: Any,
                        cp: int, rank: int) -> Tensor:  # fmt: skip
    """Turned back."""
    return _rotate(t, freqs, cu_seqlens, cp, rank, -1)


def convert_thd_to_bshd(t: Tensor, cu_seqlens: Tensor, batch: int, width: int) -> Tensor:
    """[t, h, d] -> [b, s, h, d], zeros behind each row."""
    out = t.new_zeros(batch, width, *t.shape[1:])
    for row, (start, stop) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        out[row, : stop - start] = t[start:stop]
    return out


def convert_bshd_to_thd(t: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The inverse."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([t[row, :length] for row, length in enumerate(lengths)])


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool, *_: Any) -> tuple:
    """Norm of all tensors, and of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms if per_tensor else None


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """The second list's tensors from the first's."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(chunk: int, noop: Tensor, lists: list, lr: float, beta1: float, beta2: float, eps: float,
                      step: int, adam_w: int, bias_correction: int, weight_decay: float) -> None:  # fmt: skip
    """Gradients, weights and the two moments in four lists."""
    assert adam_w and bias_correction and len(lists) == 4
    for grad, weight, m, v in zip(*lists, strict=True):
        m.lerp_(grad.float(), 1 - beta1)
        v.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        weight.sub_(lr * (m / (1 - beta1**step) / denominator + weight_decay * weight))


KERNELS = (
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_adam,
    rmsnorm_fwd,
    rmsnorm_bwd,
    generic_gemm,
    te_general_grouped_gemm,
    fused_rope_forward,
    fused_rope_backward,
    convert_thd_to_bshd,
    convert_bshd_to_thd,
)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        return retarget(self.get_data(self.path).replace(b".is_cuda", b".is_cpu"), str(self.path))


class _Finder(importlib.abc.MetaPathFinder):
    """Modules of the package with every mention of CUDA retargeted, as Megatron's are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path or [str(self.folder)])
        if spec and spec.origin and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def install(folder: Path) -> None:
    """Make `import transformer_engine` find the sources in `folder`, with the stand-ins for their kernels."""
    sys.path.append(str(folder))  # for its metadata
    sys.meta_path.insert(0, _Finder(folder))
    kernels = _Names("transformer_engine_torch")
    kernels.DType, kernels.NVTE_Fused_Attn_Backend = DType, FusedAttention
    mentioned = ["layernorm_fwd", "layernorm_bwd"]
    kernels.__all__ = [*mentioned, *(kernel.__name__ for kernel in KERNELS)]  # type: ignore[attr-defined]
    for kernel in KERNELS:
        setattr(kernels, kernel.__name__, kernel)
    # No fused attention and no flash-attn: Transformer Engine's own attention of torch operations.
    kernels.get_fused_attn_backend = lambda *args: kernels.NVTE_Fused_Attn_Backend.NVTE_No_Backend
    kernels.get_num_cublas_streams = lambda: 1
    kernels.get_cudnn_version = lambda: 91400
    common = types.ModuleType(f"{PACKAGE}.common")
    common.__path__ = [str(folder / PACKAGE / "common")]
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    onnx = f"{PACKAGE}.pytorch.onnx_extensions"  # wants onnxscript
    sys.modules |= {"transformer_engine_torch": kernels, f"{PACKAGE}.common": common, onnx: _Names(onnx)}
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=1)
    for name, value in {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
    }.items():
        setattr(cpu_cuda, name, value)
    import transformer_engine

    transformer_engine.common = common
    import transformer_engine.pytorch
    import transformer_engine.pytorch.cpp_extensions as extensions

    extensions.get_cudnn_version = kernels.get_cudnn_version
    for module in [m for name, m in sys.modules.items() if name.startswith(f"{PACKAGE}.")]:
        if hasattr(module, "canonicalize_device"):
            module.canonicalize_device = lambda device: torch.device("cpu")
