"""From trained weights to serving engines: stage, load, check, publish.

Invariant: an engine serves a `policy_version` only after its weights arrived whole and, on canary steps, after its
log-probs agreed with Megatron's on the same tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import Tensor

from rlhf3d.batching.batch import from_sequences
from rlhf3d.config.schema import Config
from rlhf3d.engine.dtypes import DTYPES
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import hf_tensors
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.resharding.send import planned_slices
from rlhf3d.resharding.staging import StagingArea, plan_staging, staging_path

CANARY_LIMIT = {"bfloat16": 0.1, "float32": 1e-3}


class CanaryError(RuntimeError):
    """Engine and trainer disagree about the same tokens under what should be the same weights."""


class WeightSync:
    """Moves the actor's weights into the engines and keeps count of versions."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        train: TrainGroup,
        rollout: RolloutGroup,
        canary: Sequence[Sequence[int]],
    ) -> None:
        """`canary`: a few token sequences that both sides score."""
        self.config = config.rollout
        self.train, self.rollout = train, rollout
        self.canary = [list(tokens) for tokens in canary]
        slices = planned_slices(spec, train.layout)
        self.plan = plan_staging(hf_tensors(spec, "lm"), DTYPES[self.config.dtype], slices)
        self.path = staging_path(self.plan, f"{os.getpid()}")
        self.area = StagingArea.create(self.plan, self.path)
        self.trained_version = 0
        self.served_version: int | None = None
        self.syncs = 0
        limit = self.config.canary_max_abs_diff
        both_fp32 = config.model.dtype == self.config.dtype == "float32"
        self.limit = CANARY_LIMIT["float32" if both_fp32 else "bfloat16"] if limit is None else limit

    def weights_changed(self) -> None:
        """The actor was updated: what the engines hold is old."""
        self.trained_version += 1

    @property
    def needed(self) -> bool:
        """Whether the engines lack the newest weights."""
        return self.served_version != self.trained_version

    def run(self) -> dict[str, float]:
        """Sync; metrics of it. Raises CanaryError or WorkerFailure, and then nothing serves the new version."""
        version = self.trained_version
        staged = self._stage()
        reports = self.rollout.update_weights(self.plan, str(self.path), version)
        metrics = {
            "sync/staged_bytes": float(sum(staged)),
            "sync/verify_s": max(report.verify_s for report in reports),
            "sync/load_s": max(report.load_s for report in reports),
        }
        every = self.config.canary_every
        if self.syncs < self.config.canary_steps or (every and self.syncs % every == 0):
            metrics["sync/canary_abs_diff"] = self._check_canary()
        self.rollout.publish(version)
        self.served_version = version
        self.syncs += 1
        return metrics

    def _stage(self) -> list[int]:
        """Have every rank write its share of the newest weights; bytes by rank."""
        return self.train.call_all("sync_weights", "stage_weights", self.plan, str(self.path), self.trained_version)

    def staged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The newest weights in the engines' dtype, by HF name."""
        if self.needed:
            self._stage()
        yield from self.area.tensors()

    def _check_canary(self) -> float:
        """Largest over engines of the mean |log-prob difference| on the canary tokens."""
        # Token 0 has no prediction: it plays the prompt, the rest the response.
        batch = from_sequences([t[:1] for t in self.canary], [t[1:] for t in self.canary], pad_id=0)
        trained = self.train.forward("sync_weights (canary)", "actor", batch)["logprobs"]
        temperature = self.train.temperature
        worst = 0.0
        for number, engine in enumerate(self.rollout.score(self.canary, temperature)):
            diffs = [
                abs(a - b)
                for row, scores in zip(trained.tolist(), engine, strict=True)
                for a, b in zip(row, scores, strict=False)
            ]
            mean = sum(diffs) / len(diffs)
            if not mean <= self.limit:
                raise CanaryError(
                    f"after the sync of policy {self.trained_version}, engine {number} and the trainer give the same "
                    f"{len(diffs)} tokens log-probs that differ by {mean:.3g} on average (limit {self.limit:g}): the "
                    "engine does not hold the trained weights. Check rollout.dtype, then report it; "
                    "rollout.canary_max_abs_diff sets the limit"
                )
            worst = max(worst, mean)
        return worst

    def close(self) -> None:
        """Free the staging area."""
        self.area.unlink()
        # The frames of an error may still hold views; the mapping then goes with the process.
        with suppress(BufferError):
            self.area.close()
