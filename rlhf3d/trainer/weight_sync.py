"""From trained weights to serving engines: send, load, check, publish.

Invariant: an engine serves a `policy_version` only after all of its weights arrived and, on canary
steps, after the canary agreed.
Runs in: driver; the ranks at both ends are `resharding/sending.py` and `resharding/receiving.py`.
"""

from __future__ import annotations

from typing import Any

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.experience.collect import Phase
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.waiting import gather
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.trainer.canary import Canary


class WeightSync:
    """Moves the actor's weights into the engines and keeps count of versions."""

    def __init__(
        self,
        config: RolloutConfig,
        setup: SyncSetup,
        actor: TrainGroup,
        rollout: RolloutGroup,
        canary: Canary,
        phase: Phase,
    ) -> None:
        """Open the stream between all processes."""
        self.config, self.setup = config, setup
        self.actor, self.rollout, self.canary = actor, rollout, canary
        self._phase = phase
        open_stream(setup, actor, rollout)
        self.trained_version = 0
        """Version of the actor's weights: the number of its updates."""
        self.served_version: int | None = None
        """Version that the engines serve; None where they hold no weights."""
        # Both ends number the slots of shared memory by it.
        self.syncs = 0

    def weights_changed(self) -> None:
        """The actor was updated: what the engines hold is old."""
        self.trained_version += 1

    def sleep_engines(self) -> None:
        """Leave the engines' memory to the updates, where the configuration says so."""
        if self.config.sleep:
            self.rollout.sleep()
            # Asleep they serve nothing: the next use must send the weights again.
            self.served_version = None

    def sync_weights(self) -> dict[str, float]:
        """Give the engines the newest weights where they lack them; the phase's metrics.

        Raises CanaryError or WorkerFailure, and then nothing serves the new version.
        """
        if self.served_version == self.trained_version:
            return {}
        with self._phase("sync_weights"):
            version = self.trained_version
            metrics = self._send(version)
            # Loaded and not published yet: where the canary fails, nothing was served.
            if self.canary.due(self.syncs):
                metrics["sync/canary_abs_diff"] = self.canary.check(version)
            self.rollout.publish(version)
            self.served_version = version
            self.syncs += 1
            return metrics

    def _send(self, version: int) -> dict[str, float]:
        """Move the weights; the engines have loaded them afterwards and do not serve them yet."""
        # Both sides start before either is waited for: each blocks until the other answers.
        sends = self.actor.start_all(TrainWorker.send_weights, self.setup.name, version, self.syncs)
        loads = self.rollout.start_update_weights(version, self.syncs)
        calls: dict[str, Any] = {**sends, **loads}  # one deadline for both sides
        results = gather("sync_weights", calls, self.actor.timeout_s)
        sent, loaded = results[: len(sends)], results[len(sends) :]
        return {
            "sync/sent_bytes": float(sum(report.sent_bytes for report in sent)),
            # The slowest of all processes, which work at the same time.
            "sync/send_s": max(report.send_s for report in sent),
            "sync/wait_s": max(report.wait_s for report in loaded),
            "sync/verify_s": max(report.verify_s for report in loaded),
            "sync/load_s": max(report.load_s for report in loaded),
        }


def open_stream(setup: SyncSetup, actor: TrainGroup, rollout: RolloutGroup | None) -> None:
    """Make and open a weight stream everywhere.

    With engines, its files are unlinked once all have opened them. Without, the reader has to open
    them and then call `seal_stream`.
    """
    phase = "open weight stream"
    # All ranks answer before any opens what another has made.
    actor.call_all(phase, TrainWorker.create_stream, setup)
    # At training rank 0, which is rank 0 of the messages' group and serves its store.
    meeting = actor.meeting_place() if setup.needs_messages else None
    opening = actor.start_all(TrainWorker.open_stream, setup.name, meeting)
    if rollout is not None:
        opening |= rollout.start_open_weights(setup, meeting)
    gather(phase, opening, actor.timeout_s)
    if rollout is not None:
        seal_stream(setup, actor)


def seal_stream(setup: SyncSetup, actor: TrainGroup) -> None:
    """Remove the names of a stream's files, open everywhere by now: a crash leaves none behind."""
    actor.call_all("open weight stream", TrainWorker.seal_stream, setup.name)
