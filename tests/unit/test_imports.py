"""Which way dependencies run: pure rooms load no Ray, vLLM or Megatron, and the command line no
torch.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PURE = (
    "rlhf3d.algorithms.advantages, rlhf3d.algorithms.losses, rlhf3d.algorithms.kl, "
    "rlhf3d.algorithms.rewards, rlhf3d.batching.dispatch, rlhf3d.resharding.ring, "
    "rlhf3d.models.weights, rlhf3d.models.spec, rlhf3d.parallel.layout, rlhf3d.parallel.platform, "
    "rlhf3d.data.loader, rlhf3d.rewards.manager, rlhf3d.rollout.api, rlhf3d.experience.source, "
    "rlhf3d.experience.trajectory"
)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (PURE, {"ray", "vllm", "megatron"}),
        (
            "rlhf3d.cli, rlhf3d.config.load, rlhf3d.resharding.setup, "
            "rlhf3d.planning.search.command, rlhf3d.environments.load",
            {"torch", "ray", "vllm", "megatron"},
        ),
        # Ray's processes import these before they know how many threads torch is to have.
        (
            "rlhf3d.placement.worker, rlhf3d.placement.engine_rank",
            {"torch", "vllm", "megatron", "transformers", "networkx"},
        ),
    ],
)
def test_pure_modules_load_nothing_heavy(modules: str, heavy: set[str]) -> None:
    script = f"import sys; import {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert not heavy & set(loaded.stdout.split())
