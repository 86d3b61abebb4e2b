"""From trained weights to serving engines: send, load, check, publish, export.

Invariant: an engine serves a `policy_version` only after its weights arrived whole and, on canary
steps, after its log-probs agreed with Megatron's on the same tokens and its prefix cache was seen
to be empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from torch import Tensor

from rlhf3d.batching.batch import from_sequences
from rlhf3d.config.schema import Config
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.waiting import gather
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.resharding.receiving import RingInbox, WeightReceiver
from rlhf3d.resharding.setup import SyncSetup

CANARY_LIMIT = {"float32": 1e-3, "bfloat16": 0.1, "fp8_per_channel": 0.4}


_TRY = (
    "Try rollout.dtype=float32 and model.dtype=float32, without rollout.quantization: where they agree then, it was "
    "rounding, and rollout.canary_max_abs_diff may be raised; else the engine lacks the trained weights: report this"
)
_NOT_FINITE = (
    "The weights are not finite: look at those it began with (`rlhf3d inspect MODEL --deep`), "
    "or lower actor.optim.lr"
)


class CanaryError(RuntimeError):
    """Engine and trainer disagree about the same tokens under what should be the same weights."""


class WeightSync:
    """Moves the actor's weights into the engines and keeps count of versions."""

    def __init__(
        self,
        config: Config,
        setup: SyncSetup,
        train: TrainGroup,
        rollout: RolloutGroup,
        canary: Sequence[Sequence[int]],
    ) -> None:
        """Open the stream between all processes.

        `canary`: a few token sequences that both sides score.
        """
        self.config = config.rollout
        self.train, self.rollout = train, rollout
        self.canary = [list(tokens) for tokens in canary]
        self.setup = setup
        self.export_dtype = config.model.dtype
        self._exporter: WeightReceiver | None = None
        self._open_files = ExitStack()
        self._open(self.setup, rollout)
        self.trained_version = 0
        self.served_version: int | None = None
        self.syncs = self.exports = 0
        limit = self.config.canary_max_abs_diff
        kind: str = self.config.quantization
        if kind == "none":
            kind = "float32" if config.model.dtype == self.config.dtype == "float32" else "bfloat16"
        self.limit = CANARY_LIMIT[kind] if limit is None else limit

    def weights_changed(self) -> None:
        """The actor was updated: what the engines hold is old."""
        self.trained_version += 1

    def weights_lost(self) -> None:
        """The engines hold no weights any more."""
        self.served_version = None

    @property
    def needed(self) -> bool:
        """Whether the engines lack the newest weights."""
        return self.served_version != self.trained_version

    def run(self) -> dict[str, float]:
        """Sync; metrics of it.

        Raises CanaryError or WorkerFailure, and then nothing serves the new version.
        """
        version = self.trained_version
        sends = self.train.start_all(TrainWorker.send_weights, self.setup.name, version, self.syncs)
        loads = self.rollout.start_update_weights(version, self.syncs)
        calls: dict[str, Any] = {**sends, **loads}  # one deadline for both sides
        results = gather("sync_weights", calls, self.train.timeout_s)
        sent, loaded = results[: len(sends)], results[len(sends) :]
        metrics = {
            "sync/sent_bytes": float(sum(report.sent_bytes for report in sent)),
            "sync/send_s": max(report.send_s for report in sent),
            "sync/wait_s": max(report.wait_s for report in loaded),
            "sync/verify_s": max(report.verify_s for report in loaded),
            "sync/load_s": max(report.load_s for report in loaded),
        }
        every = self.config.canary_every
        if self.syncs < self.config.canary_steps or (every and self.syncs % every == 0):
            trained = self._trained_logprobs()  # while the engines' caches may still be asleep
            self._check_prefix_cache()  # before the canary's own prompts go into it
            metrics["sync/canary_abs_diff"] = self._check_canary(trained)
        self.rollout.publish(version)
        self.served_version = version
        self.syncs += 1
        return metrics

    def export_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The newest weights in the training dtype, by HF name."""
        if self._exporter is None:
            self._exporter = self._open_export()
        stream, sync = self._exporter, self.exports
        self.exports += 1
        sends = self.train.start_all(
            TrainWorker.send_weights, stream.setup.name, self.trained_version, sync
        )
        for param, tensor in stream.stream_params(self.trained_version, sync):
            yield param.name, tensor.clone()
        gather("save_checkpoint", sends, self.train.timeout_s)

    def exporting_rank(self) -> int:
        """The first training rank on the driver's node, which gathers an export.

        Raises ValueError without one.
        """
        here = self.train.first_rank_here()
        if here is None:
            raise ValueError(
                "trainer.save_hf: exporting the actor's weights needs a training rank of actor.layout on the driver's "
                "node: start the command on a node that trains, or set trainer.save_hf=never (`rlhf3d convert` "
                "exports a checkpoint later)"
            )
        return here

    def close(self) -> None:
        """Let go of shared memory; other processes' goes with them."""
        self._open_files.close()

    def _open(self, setup: SyncSetup, rollout: RolloutGroup | None) -> None:
        """Make and open a stream everywhere; its files have no names afterwards."""
        phase = "open weight stream"
        self.train.call_all(phase, TrainWorker.create_stream, setup)
        meeting = self.train.meeting_place() if setup.needs_messages else None
        opening = self.train.start_all(TrainWorker.open_stream, setup.name, meeting)
        if rollout is not None:
            opening |= rollout.start_open_weights(setup, meeting)
        gather(phase, opening, self.train.timeout_s)
        if rollout is not None:
            self.train.call_all(phase, TrainWorker.seal_stream, setup.name)

    def _open_export(self) -> WeightReceiver:
        setup = replace(
            self.setup,
            name=f"{self.setup.name}-export",
            dtype=self.export_dtype,
            target="export",
            colocated=True,
            reader_beside=self.exporting_rank(),
        )
        self._open(setup, None)
        inbox = self._open_files.enter_context(closing(RingInbox(setup, 0)))
        self.train.call_all("open weight stream", TrainWorker.seal_stream, setup.name)
        return WeightReceiver(setup, 0, inbox)

    def _trained_logprobs(self) -> Tensor:
        """The trainer's log-probs of the canary tokens after the first."""
        # Token 0 has no prediction: it plays the prompt, the rest the response.
        batch = from_sequences([t[:1] for t in self.canary], [t[1:] for t in self.canary], pad_id=0)
        phase = "sync_weights (canary)"
        return self.train.forward(phase, "actor", batch, measure_padding=False)["logprobs"]

    def _check_canary(self, trained: Tensor) -> float:
        """Largest mean |log-prob difference| between an engine and the trainer on the canary."""
        temperature = self.config.temperature
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
                    f"{len(diffs)} tokens log-probs that differ by {mean:.3g} on average (limit {self.limit:g}). "
                    f"{_TRY if math.isfinite(mean) else _NOT_FINITE}"
                )
            worst = max(worst, mean)
        return worst

    def _check_prefix_cache(self) -> None:
        for number, cached in enumerate(self.rollout.cached_tokens()):
            if cached:
                raise CanaryError(
                    f"after the sync of policy {self.trained_version}, engine {number} still took {cached} tokens of a "
                    "prompt from its prefix cache, computed with older weights: report it"
                )
