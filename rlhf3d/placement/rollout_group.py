"""The vLLM engines as the driver sees them: requests in, completions out, in the same order.

Invariant: all engines serve the same `policy_version`; none serves before it was synced and published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf3d.config.schema import Config
from rlhf3d.placement.resources import Placement
from rlhf3d.placement.waiting import gather
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import Completion, Request, SamplingSettings
from rlhf3d.rollout.vllm_engine import VLLMEngine


class RolloutGroup:
    """Handles of the engines."""

    def __init__(
        self, config: Config, placement: Placement, reserved: PlacementGroup, arguments: dict[str, Any]
    ) -> None:
        """Start the engines; `arguments` are VLLMEngine's."""
        self.timeout_s = config.cluster.phase_timeout_s
        self.startup_timeout_s = config.cluster.startup_timeout_s
        self.engines = [
            ray.remote(VLLMEngine)
            .options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(reserved, bundle),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(arguments["threads"])}},
                **placement.engine_options,
            )
            .remote(**arguments)
            for bundle in placement.engine_bundles
        ]

    def wait_ready(self) -> None:
        """Return when every engine is up."""
        calls = {f"engine {i}": engine.__ray_ready__.remote() for i, engine in enumerate(self.engines)}
        gather("start vLLM", calls, self.startup_timeout_s)

    def _start_all(self, method: str, *args: object) -> dict[str, ray.ObjectRef]:
        return {f"engine {i}": getattr(engine, method).remote(*args) for i, engine in enumerate(self.engines)}

    def _on_all(self, phase: str, method: str, *args: object) -> list:
        return gather(phase, self._start_all(method, *args), self.timeout_s)

    def generate(self, phase: str, requests: Sequence[Request], sampling: SamplingSettings) -> list[Completion]:
        """One completion a request; requests are dealt to the engines in turn."""
        count = len(self.engines)
        calls = {
            f"engine {i}": engine.generate.remote(list(requests[i::count]), sampling)
            for i, engine in enumerate(self.engines)
            if requests[i::count]
        }
        completions: list[Completion | None] = [None] * len(requests)
        for i, part in enumerate(gather(phase, calls, self.timeout_s)):
            completions[i::count] = part
        assert all(c is not None for c in completions), "an engine dropped a request"
        return [c for c in completions if c is not None]

    def start_open_weights(self, setup: SyncSetup, meeting: tuple[str, int] | None) -> dict[str, ray.ObjectRef]:
        """Start to open every engine's end of the weight stream."""
        return {f"engine {i}": engine.open_weights.remote(setup, i, meeting) for i, engine in enumerate(self.engines)}

    def start_update_weights(self, policy_version: int, sync: int) -> dict[str, ray.ObjectRef]:
        """Start to load a sync into every engine (SyncReport each); they serve only after `publish`."""
        return self._start_all("update_weights", policy_version, sync)

    def score(self, sequences: list[list[int]], temperature: float) -> list[list[list[float]]]:
        """Per engine, log-probs of each sequence's tokens after the first, under the loaded weights."""
        return self._on_all("sync_weights (canary)", "score", sequences, temperature)

    def cached_tokens(self) -> list[int]:
        """Per engine, see `RolloutEngine.cached_tokens`."""
        return self._on_all("sync_weights (canary)", "cached_tokens")

    def publish(self, policy_version: int) -> None:
        """Let the engines serve these weights."""
        self._on_all("sync_weights", "publish", policy_version)

    def close(self) -> None:
        """Let the engines end their own processes; a failed run's are ended by Ray."""
        self._on_all("stop vLLM", "close")
