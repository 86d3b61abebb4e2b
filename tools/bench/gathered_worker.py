"""The common way to load whole tensors into a running vLLM engine, for `reshard_speed.py` to
measure.
"""

from __future__ import annotations

from reshard_speed import gathered_area
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.worker_extension import WeightSyncWorker


class GatheredWorker(WeightSyncWorker):
    """vLLM's own reload of a model from Hugging Face tensors."""

    def load_gathered(self, setup: SyncSetup) -> None:
        """Load every tensor; tied heads are packed anew, which vLLM's reload forgets on CPU."""
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            model.load_weights(iter(gathered_area(setup).items()))
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            for layer in model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)
