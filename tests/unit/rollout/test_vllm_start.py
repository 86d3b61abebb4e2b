"""What weights an engine starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_start import ZEROS, llm_arguments, register_zeros


def test_only_engines_on_cpu_that_do_not_quantize_start_from_zeros() -> None:
    rollout = RolloutConfig(dtype="bfloat16", enforce_eager=True)
    engine = EngineSettings("model", rollout, 1024, CPUPlatform("test"))
    quantized = replace(rollout, quantization="fp8_per_channel")
    wanted = {
        ZEROS: engine,
        "safetensors": replace(engine, load_weights=True),
        "dummy": replace(engine, rollout=quantized),
    }
    for name, settings in wanted.items():
        assert llm_arguments(settings)["load_format"] == name
    on_gpu = replace(engine, platform=CUDAPlatform("test"))
    assert llm_arguments(on_gpu)["load_format"] == "dummy"


def load_zeros() -> list[list[float]]:
    """In vLLM's process: what its loader of that name makes of a layer's weights and buffers."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    register_zeros()
    layer: Any = torch.nn.BatchNorm1d(2)
    get_model_loader(LoadConfig(load_format=ZEROS)).load_weights(layer, None)  # type: ignore[arg-type]
    return [tensor.flatten().tolist() for tensor in layer.state_dict().values()]


def test_vllm_knows_weights_of_zeros(in_vllm_process: Callable[..., Any]) -> None:
    assert in_vllm_process(load_zeros) == [[0.0, 0.0]] * 4 + [[0]]
