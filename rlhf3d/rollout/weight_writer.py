"""New weights for a live vLLM model, in vLLM's own layout, without a second copy of the model.

Invariant: after `finish`, every layer computes with what was written since the last one, and
nothing of the source stays referenced.

Most parameters are live storage, and rows are copied into them. vLLM's CPU kernels instead compute
with packed copies that no write to a parameter reaches: linear layers (whose plain weight is gone),
vocabulary heads (whose weight may be the embedding's) and experts. Those are packed again, by
vLLM's own code. So are layers that compute in FP8: vLLM quantizes the complete new weight as it
does at its start. `_is_packed` alone distinguishes the two kinds, by looking at the layer. A layout
that is neither plain nor known is refused by name.
Read against vLLM 0.32.
Runs in: engine rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.pytorch import (
    ChannelWiseTorchFP8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlhf3d.models.weights import LocalParam

PLAIN_MOE_BACKENDS = (UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON)
"""CUDA expert kernels that compute with [experts, rows, columns] as it was created; others shuffle
it in place."""
FP8_KERNELS = (ChannelWiseTorchFP8ScaledMMLinearKernel, CutlassFP8ScaledMMLinearKernel)
"""FP8 kernels that compute with a layer's `weight` and `weight_scale` and keep nothing else."""


@dataclass(frozen=True)
class _Slot:
    """A parameter's place: attribute `leaf` of `layer`."""

    layer: Any
    leaf: str
    packed: bool

    @property
    def tensor(self) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self.layer, self.leaf).data
        return tensor


class WeightWriter:
    """Write parameters, complete or in row ranges, into a live vLLM model.

    One update: for every parameter, `in_place` and copies into it, or `load_packed`; then `finish`.
    The order of parameters does not matter. The model must not run in between.
    """

    def __init__(
        self, model: torch.nn.Module, params: Sequence[LocalParam], dtype: torch.dtype
    ) -> None:
        """Take the `params` of this rank (`engine_params`), whose values will be of `dtype`.

        Raises RuntimeError naming the parameter whose name, shape or dtype is not the model's, or
        whose layer keeps it in a layout this class does not know.
        """
        self._model = model
        self._dtype = dtype
        self._shapes = {param.name: param.shape for param in params}
        _check_names(model, self._shapes)
        self._slots = {param.name: _slot(model, param, dtype) for param in params}
        # By layer: name and copy of the first of its two expert weights to come in an update.
        self._half_experts: dict[RoutedExperts, tuple[str, torch.Tensor]] = {}
        self._real_rows: dict[str, int] = {}
        """Rows before the padding, which is never sent and lost in sleep: `finish` zeroes it."""
        for param in params:
            slot = self._slots[param.name]
            if not isinstance(slot.layer, VocabParallelEmbedding):
                continue
            # Where the rows of each piece end; without a piece the share is all padding.
            ends = [piece.local_box[0][1] for piece in param.pieces]
            self._real_rows[param.name] = max(ends, default=0)
            if not isinstance(slot.layer, ParallelLMHead):
                # Embeddings are looked up, never multiplied: the packed copy is a waste.
                vars(slot.layer).pop("cpu_linear", None)

    def in_place(self, name: str) -> torch.Tensor | None:
        """Return the live storage of a parameter, to `copy_` rows into.

        `copy_` casts: a bias may be float32. None where a kernel computes with a packed copy alone:
        `load_packed` then takes the complete tensor.
        """
        slot = self._slots[name]
        return None if slot.packed else slot.tensor

    def load_packed(self, name: str, weight: torch.Tensor) -> None:
        """Give a packed layer its complete new weight, contiguous, and pack it.

        `weight` may change afterwards. Raises RuntimeError when vLLM did not pack it as at its
        start: this engine is then unusable.
        """
        slot = self._slots[name]
        assert slot.packed, f"{name} is not packed: write to in_place"
        assert weight.shape == self._shapes[name], name
        assert weight.dtype == self._dtype and weight.is_contiguous(), name
        if isinstance(slot.layer, RoutedExperts):
            self._load_experts(name, weight)
        elif _is_quantized(slot.layer):
            _quantize(slot.layer, weight)
        else:
            _pack(slot.layer, weight)
        # A layer that kept `weight` itself would change with the stream's next bucket.
        if slot.tensor.data_ptr() == weight.data_ptr():
            raise RuntimeError(
                f"{name}: vLLM kept the plain weight where it kept a packed copy at its start"
            )

    def finish(self) -> None:
        """Pack what depends on several parameters: heads, tied or not.

        Raises RuntimeError when a layer got only one of its two weights.
        """
        if self._half_experts:
            name, _ = next(iter(self._half_experts.values()))
            raise RuntimeError(
                f"{name} came alone: a layer's experts are packed once both of their weights are "
                "there"
            )
        for padded, rows in self._real_rows.items():
            self._slots[padded].tensor[rows:].zero_()
        # A tied head too: its packed copy is apart from the embedding that was written.
        for layer in self._model.modules():
            if isinstance(layer, ParallelLMHead):
                _pack(layer, layer.weight)

    def forget(self) -> None:
        """Make every parameter NaN."""
        for name, shape in self._shapes.items():
            live = self.in_place(name)
            if live is None:
                self.load_packed(name, torch.full(shape, torch.nan, dtype=self._dtype))
            else:
                live.fill_(torch.nan)
        self.finish()

    def _load_experts(self, name: str, weight: torch.Tensor) -> None:
        """Pack a layer's experts when both of their weights are here; the first waits as a copy."""
        layer = self._slots[name].layer
        first, waiting = self._half_experts.pop(layer, (name, weight))
        if first == name:
            # The stream reuses the memory of `weight` before the second comes.
            self._half_experts[layer] = name, weight.clone()
            return
        for part, value in ((first, waiting), (name, weight)):
            setattr(layer, self._slots[part].leaf, torch.nn.Parameter(value, requires_grad=False))
        # The quant method's own update would skip this, and leave plain weights where packed ones
        # are read.
        layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def _pack(layer: Any, weight: torch.Tensor) -> None:
    """Let vLLM pack `weight` for a linear layer or head; on CUDA there is nothing to pack."""
    vars(layer).pop("cpu_linear", None)  # frees the old packed copy before the new one is made
    # A head's own parameter stays the same object: an embedding may share it.
    if not isinstance(weight, torch.nn.Parameter):
        weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight = weight
    layer.quant_method.process_weights_after_loading(layer)


def _quantize(layer: Any, weight: torch.Tensor) -> None:
    """Let vLLM quantize `weight` [out, in] into the storage that kernels, and CUDA graphs, read."""
    live = {name: getattr(layer, name) for name in ("weight", "weight_scale")}
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    # vLLM quantizes a layer once, unless this says that it has not.
    layer._already_called_process_weights_after_loading = False
    layer.quant_method.process_weights_after_loading(layer)
    for name, parameter in live.items():
        parameter.data.copy_(getattr(layer, name))
        setattr(layer, name, parameter)


def _is_quantized(layer: Any) -> bool:
    # The exact type: a subclass may keep weights in another layout.
    return type(getattr(layer, "quant_method", None)) is Fp8PtpcOnlineLinearMethod


def _check_names(model: torch.nn.Module, wanted: dict[str, tuple[int, ...]]) -> None:
    names = {name for name, _ in model.named_parameters()}
    for name, layer in model.named_modules():
        # Computed from the weight, so it is in no weight table.
        if _is_quantized(layer):
            names.discard(f"{name}.weight_scale")
    problems = []
    only_vllm, only_table = names - set(wanted), set(wanted) - names
    for problem, odd in (("lacks", only_vllm), ("alone has", only_table)):
        if odd:
            problems.append(f"{problem} {', '.join(sorted(odd)[:5])} ({len(odd)} in all)")
    if problems:
        raise RuntimeError(
            f"vLLM's {type(model).__name__} and the weight table differ: the table "
            f"{' and '.join(problems)}"
        )


def _slot(model: torch.nn.Module, param: LocalParam, dtype: torch.dtype) -> _Slot:
    parent, _, leaf = param.name.rpartition(".")
    layer: Any = model.get_submodule(parent)
    live = getattr(layer, leaf)
    # vLLM records parameters before kernels change them; not biases, which are never packed.
    recorded = get_layerwise_info(layer).restore_metadata[0].get(leaf, live)
    if tuple(recorded.shape) != param.shape:
        raise RuntimeError(
            f"{param.name} has shape {tuple(recorded.shape)} in vLLM and {param.shape} in the "
            "weight table"
        )
    # vLLM's CPU kernels may turn biases into float32.
    if recorded.dtype != dtype and leaf != "bias":
        raise RuntimeError(
            f"{param.name} is {recorded.dtype} in vLLM; the weights to come are {dtype}"
        )
    packed = _is_packed(layer, live, param.name)
    if not packed and tuple(live.shape) != param.shape:
        raise RuntimeError(
            f"{param.name}: vLLM keeps it as {tuple(live.shape)}, which is no plain {param.shape}"
        )
    return _Slot(layer, leaf, packed)


def _is_packed(layer: Any, live: torch.Tensor, name: str) -> bool:
    """Whether kernels compute with a packed copy only.

    Raises RuntimeError for a layout this file does not know.
    """
    method: Any = getattr(layer, "quant_method", None)
    if type(method) is UnquantizedFusedMoEMethod:
        backend = method.unquantized_backend
        if (
            backend == UnquantizedMoeBackend.CPU
            and not method.moe_kernel.fused_experts._use_zentorch
        ):
            return True
        if backend in PLAIN_MOE_BACKENDS and live.device.type == "cuda" and live.is_contiguous():
            return False
        raise RuntimeError(
            f"{name}: vLLM's {backend.value} kernels keep experts in a layout of their own, which "
            "cannot be written to; start the engine with moe_backend='triton'"
        )
    if _is_quantized(layer):
        if not isinstance(method.fp8_linear, FP8_KERNELS):
            raise RuntimeError(
                f"{name}: {type(method.fp8_linear).__name__} may keep weights in a layout of its "
                "own, which cannot be written to; set rollout.quantization=none"
            )
        return name.endswith(".weight")
    if method is not None and type(method) not in (
        UnquantizedLinearMethod,
        UnquantizedEmbeddingMethod,
    ):
        raise RuntimeError(
            f"{name}: weights of {type(method).__name__} cannot be written to; unquantized and "
            "fp8_per_channel ones can"
        )
    # Where vLLM computes with a packed copy alone, it leaves an empty parameter.
    return live.numel() == 0
