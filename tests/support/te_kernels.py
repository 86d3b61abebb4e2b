"""Transformer Engine without a GPU.

Its own Python, its compiled kernels replaced by a few lines of torch each.

Invariant: everything above the kernels is Transformer Engine's and Megatron's released code; a
kernel that has no stand-in here fails when it is called. Import before Megatron, in a process of
its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import zlib
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
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FusedAttention(IntEnum):
    """cuDNN's attention kernels."""

    NVTE_No_Backend = -1
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

    def __int__(self) -> int:
        return zlib.crc32(
            self._name.encode()
        )  # members of enumerations are put into tables by number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self._name} has no stand-in")


class _Names(types.ModuleType):
    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *_: Any
) -> tuple:
    """Normalized rows, nothing, and 1 / root mean square."""
    assert out is None and quantizer is None
    rsigma = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * rsigma[:, None] * weight.float()).to(x.dtype), None, rsigma


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight."""
    normal, scaled = x.float() * rsigma[:, None], dy.float() * weight.float()
    dx = rsigma[:, None] * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normal).sum(0).to(weight.dtype)


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    bias: Any,
    bias_dtype: Any,
    gelu: bool,
    *rest: Any,
    **_: Any,
) -> tuple:
    """B · Aᵀ ("TN"), B · A ("NN") or Bᵀ · A ("NT"), rows of the last dimension."""
    assert bias is None and not gelu and quantizer is None
    accumulate = rest[4]
    a = A.flatten(0, -2) if A.dim() > 2 else A
    b = B.flatten(0, -2) if transb and B.dim() > 2 else B
    a, b = (a, b) if out is None else (a.to(out.dtype), b.to(out.dtype))
    product = (b.t() if transb else b) @ (a.t() if transa else a)
    if out is None:
        return product, None, None, None
    out.copy_(out + product if accumulate else product)
    return out, None, None, None


def te_general_grouped_gemm(
    A: list,
    transa: bool,
    B: list,
    transb: bool,
    out: list,
    dtype: Any,
    splits: Any,
    bias: Any,
    bias_dtype: Any,
    single_output: bool,
    gelu: Any,
    grad: bool,
    workspaces: Any,
    size: int,
    accumulate: bool,
    *_: Any,
) -> Any:
    """A product a group, into one tensor after the other or the rows of one."""
    pairs = [(a.to(out[0].dtype), b.to(out[0].dtype)) for a, b in zip(A, B, strict=True)]
    products = [(b.t() if transb else b) @ (a.t() if transa else a) for a, b in pairs]
    targets = out[0].split(splits) if single_output else out
    for target, product in zip(targets, products, strict=True):
        target.copy_(target + product if accumulate else product)
    return bias


def _angles(freqs: Tensor, lengths: Sequence[int], cp: int, rank: int) -> Tensor:
    """[t, 1, d] angles of packed rows of these (complete) lengths.

    Or of the share that a context-parallel rank holds.
    """
    parts = []
    for length in lengths:
        chunks = freqs[:length, 0].chunk(2 * cp) if cp > 1 else (freqs[:length, 0],)
        parts += [chunks[rank], chunks[-1 - rank]] if cp > 1 else chunks
    return torch.cat(parts)


def _rotate(
    t: Tensor, freqs: Tensor, cu_seqlens: Tensor | None, cp: int, rank: int, sign: int
) -> Tensor:
    packed = cu_seqlens is not None
    angles = _angles(freqs, cu_seqlens.diff().tolist(), cp, rank) if packed else freqs[: t.shape[0]]
    x = t.float()
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x * angles.cos() + sign * turned * angles.sin()).to(t.dtype)


def fused_rope_forward(
    t: Tensor,
    freqs: Tensor,
    start: Any,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp: int,
    rank: int,
) -> Tensor:
    """Rotated queries or keys, sbhd or packed."""
    assert start is None and not interleaved
    return _rotate(t, freqs, cu_seqlens, cp, rank, 1)


def fused_rope_backward(
    t: Tensor,
    freqs: Tensor,
    start: Any,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Any,
    cp: int,
    rank: int,
) -> Tensor:
    """Turned back."""
    return _rotate(t, freqs, cu_seqlens, cp, rank, -1)


def convert_thd_to_bshd(t: Tensor, cu_seqlens: Tensor, batch: int, width: int) -> Tensor:
    """[t, h, d] -> [b, s, h, d], zeros behind each row."""
    out = t.new_zeros(batch, width, *t.shape[1:])
    for row, (start, stop) in enumerate(
        zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    ):
        out[row, : stop - start] = t[start:stop]
    return out


def convert_bshd_to_thd(t: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The inverse."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([t[row, :length] for row, length in enumerate(lengths)])


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple:
    """Norm of all tensors, and of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms if per_tensor else None


def multi_tensor_scale(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float | Tensor
) -> None:
    """The second list's tensors from the first's."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: list,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Gradients, weights and the two moments in four lists."""
    assert adam_w and bias_correction and len(lists) == 4
    for grad, weight, m, v in zip(*lists, strict=True):
        m.lerp_(grad.float(), 1 - beta1)
        v.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        weight.sub_(lr * (m / (1 - beta1**step) / denominator + weight_decay * weight))


def make_row_id_map(routing_map: Tensor, tokens: int, experts: int) -> Tensor:
    """[t, 2e + 1] of which the first e columns are used here.

    Where an expert's copy of a token goes, or -1.
    """
    mask = routing_map.bool()
    rows = mask.t().flatten().cumsum(0).view(experts, tokens).t() - 1
    return torch.cat(
        [torch.where(mask, rows, -1), rows.new_full((tokens, experts + 1), -1)], 1
    ).int()


def _copies(row_id_map: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and row of each copy."""
    token, expert = (row_id_map[:, :experts] >= 0).nonzero(as_tuple=True)
    return token, expert, row_id_map[token, expert].long()


def permute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    scale: Any,
    pad_offsets: Any,
    tokens: int,
    experts: int,
    rows: int,
    *_: Any,
) -> tuple:
    """Copies of tokens by expert, nothing, and their probabilities."""
    assert scale is None and pad_offsets is None
    token, expert, row = _copies(row_id_map, experts)
    source = torch.empty_like(token).index_copy_(0, row, torch.arange(rows))
    return inp[token[source]], None, None if probs is None else probs[token[source], expert[source]]


def unpermute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Any,
    probs: Tensor | None,
    pad_offsets: Any,
    tokens: int,
    experts: int,
    hidden: int,
) -> tuple:
    """Sums of each token's copies, and their probabilities [t, e]."""
    assert merging_probs is None and pad_offsets is None
    token, expert, row = _copies(row_id_map, experts)
    out = torch.zeros(tokens, hidden).index_add_(0, token, inp[row].float()).to(inp.dtype)
    back = (
        None
        if probs is None
        else probs.new_zeros(tokens, experts).index_put_((token, expert), probs[row])
    )
    return out, back


def make_chunk_sort_map(
    split_sizes: Tensor, sorted_indices: Tensor, tokens: int, splits: int
) -> Tensor:
    """Where each row goes when chunks are put into this order."""
    chunks = torch.arange(tokens).split(split_sizes.tolist())
    return torch.cat([chunks[number] for number in sorted_indices.tolist()]).argsort().int()


def sort_chunks_by_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    tokens: int,
    hidden: int,
    is_forward: bool,
) -> tuple:
    """Rows and probabilities in the new order, or back."""
    source = row_id_map.long().argsort() if is_forward else row_id_map.long()
    return inp[source], None if probs is None else probs[source]


PERMUTATION = f"{PACKAGE}.pytorch.triton.permutation"
PERMUTATION_KERNELS = (
    make_row_id_map,
    permute_with_mask_map,
    unpermute_with_mask_map,
    make_chunk_sort_map,
    sort_chunks_by_map,
)


def compare_permutation(rank: int, port: int, folder: Path) -> dict[str, bool]:
    """Whether each stand-in gives what the Triton kernel gives in Triton's interpreter.

    In a process that was started with TRITON_INTERPRET=1.
    """
    import triton

    autotune = triton.autotune  # the interpreter cannot measure which configuration is best
    triton.autotune = lambda configs, key, **options: autotune(configs[:1], key, **options)
    path = folder / f"{PERMUTATION.replace('.', '/')}.py"
    spec = importlib.util.spec_from_loader("kernels", _Loader("kernels", str(path)))
    assert spec and spec.loader
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    torch.manual_seed(0)
    tokens, experts, hidden = 5, 4, 8
    inp, probs = torch.randn(tokens, hidden), torch.rand(tokens, experts)
    routing = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(
        1, probs.topk(2).indices, True
    )
    found: dict[str, list] = {}
    for kernels in (real, sys.modules[PERMUTATION]):
        rows = kernels.make_row_id_map(routing, tokens, experts)
        out, _, weights = kernels.permute_with_mask_map(
            inp, rows, probs, None, None, tokens, experts, 2 * tokens, hidden, None
        )
        back = kernels.unpermute_with_mask_map(
            out, rows, None, weights, None, tokens, experts, hidden
        )
        order = kernels.make_chunk_sort_map(
            torch.tensor([3, 0, 5, 2]), torch.tensor([2, 0, 3, 1]), 2 * tokens, 4
        )
        there = kernels.sort_chunks_by_map(out, order, weights, 2 * tokens, hidden, is_forward=True)
        again = kernels.sort_chunks_by_map(
            *there[:1], order, there[1], 2 * tokens, hidden, is_forward=False
        )
        results = {"permute": (out, weights), "unpermute": back, "sort": there, "sort back": again}
        for name, tensors in results.items():
            found.setdefault(name, []).append(tensors)
    return {name: all(map(torch.equal, *pair)) for name, pair in found.items()}


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

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path or [str(self.folder)])
        if spec and spec.origin and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def _common(folder: Path) -> types.ModuleType:
    """The package's common module, as while it is built: no library is loaded."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    name, path = f"{PACKAGE}.common", folder / PACKAGE / "common"
    spec = importlib.util.spec_from_file_location(
        name, path / "__init__.py", submodule_search_locations=[str(path)]
    )
    assert spec and spec.loader
    sys.modules[name] = common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    return common


def install(folder: Path) -> None:
    """Make `import transformer_engine` find the sources in `folder`, and the stand-ins."""
    sys.path.append(str(folder))  # for its metadata
    sys.meta_path.insert(0, _Finder(folder))
    kernels = _Names("transformer_engine_torch")
    kernels.DType, kernels.NVTE_Fused_Attn_Backend = DType, FusedAttention
    mentioned = ["layernorm_fwd", "layernorm_bwd"]
    kernels.__all__ = [*mentioned, *(kernel.__name__ for kernel in KERNELS)]  # type: ignore[attr-defined]
    for kernel in KERNELS:
        setattr(kernels, kernel.__name__, kernel)
    # No fused attention and no flash-attn: Transformer Engine's own attention of torch operations.
    kernels.get_fused_attn_backend = lambda *args: (FusedAttention.NVTE_No_Backend, "no kernels")
    kernels.get_num_cublas_streams = lambda: 1
    kernels.get_cudnn_version = lambda: 91400
    onnx = f"{PACKAGE}.pytorch.onnx_extensions"  # wants onnxscript
    sys.modules |= {"transformer_engine_torch": kernels, onnx: _Names(onnx)}
    sys.modules[PERMUTATION] = permutation = _Names(PERMUTATION)
    for kernel in PERMUTATION_KERNELS:
        setattr(permutation, kernel.__name__, kernel)
    kernels.multi_tensor_scale_tensor = multi_tensor_scale
    common = _common(folder)
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
