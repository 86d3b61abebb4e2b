"""What rlhf3d adds to each vLLM worker: loading from the staging area, and log-probs at a temperature.

Invariant: after `load_staged_weights` every layer computes with the staged weights, packed copies included, and
nothing of the staging area stays mapped. vLLM mixes this class into its worker by name (worker_extension_cls).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from rlhf3d.resharding.staging import StagingArea, StagingPlan


class StagedWeightsWorker:
    """Methods for `LLM.collective_rpc`; `self` is vLLM's worker of one rank."""

    if TYPE_CHECKING:
        model_runner: Any
        model_config: Any
        vllm_config: Any

    def load_staged_weights(self, plan: StagingPlan, path: str) -> None:
        """Load every tensor of the area; each rank copies its own part of it.

        Raises ValueError, naming the parameter, when the plan leaves one without (all of) its weights. After any
        error here the engine is unusable, half of its layers being loaded: start another.
        """
        model = self.model_runner.get_model()
        parameters = {name for name, _ in model.named_parameters()}
        area = StagingArea.open(plan, path)
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            loaded = model.load_weights(area.tensors())
            missing = sorted(parameters - set(loaded)) + _partly_loaded(model)
            finalize_layerwise_reload(model, self.model_config)
        area.close()
        if missing:
            raise ValueError(f"the staging plan lacks weights of the engine's {', '.join(missing)}")
        _repack_tied_heads(model)

    def set_logit_scale(self, scale: float) -> None:
        """Multiply logits by `scale` (1 / temperature) before anything reads them; 1.0 restores the model's own."""
        processor: Any = getattr(self.model_runner.get_model(), "logits_processor", None)
        assert hasattr(processor, "scale"), "vLLM's model has no logits_processor.scale to score at a temperature"
        if not hasattr(self, "_own_logit_scale"):
            self._own_logit_scale = processor.scale
        processor.scale = self._own_logit_scale * scale


def _partly_loaded(model: torch.nn.Module) -> list[str]:
    """Layers, such as a fused QKV, that got some of their elements only (padded vocabularies never fill)."""
    return [
        name
        for name, layer in model.named_modules()
        if get_layerwise_info(layer).load_numel > 0 and not isinstance(layer, VocabParallelEmbedding)
    ]


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Refresh the packed copy that CPU kernels keep of a head's weight.

    vLLM re-packs layers whose weights it was given; a tied head was given none, and would go on computing with the
    copy of the old embedding.
    """
    embeddings = {
        layer.weight.data_ptr()
        for layer in model.modules()
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    }
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and layer.weight.data_ptr() in embeddings:
            layer.quant_method.process_weights_after_loading(layer)
