"""TRL's defaults, where a key that is not given would mean another run here.

Invariant: data, by TRL's names; of one version.
"""

from __future__ import annotations

from typing import Any

VERSION = "1.16"
DEFAULTS: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "beta": 0.0,
    "eval_on_start": False,
    "eval_strategy": "no",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "importance_sampling_level": "token",
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "loss_type": "dapo",
    "lr_scheduler_type": "linear",
    "max_completion_length": 512,
    "num_generations": 8,
    "num_iterations": 1,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "save_steps": 500,
    "save_strategy": "steps",
    "seed": 42,
    "use_bias_correction_kl": True,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_mode": "colocate",
    "vllm_tensor_parallel_size": 1,
    "weight_decay": 0.0,
}
