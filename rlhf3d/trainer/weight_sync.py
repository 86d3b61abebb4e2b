"""From trained weights to serving engines: send, load, check, publish.

Invariant: an engine serves a `policy_version` only after all of its weights arrived and, on canary
steps, after the canary agreed; engines whose processes die are started again, a limited number of
times. They get the same weights and go on with the same numbers; or, where the actor was updated
since, the newest weights, which write what nobody has an answer to.
Runs in: driver; the ranks at both ends are `resharding/sending.py` and `resharding/receiving.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.experience.steps import Patience, Phase
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.waiting import WorkerFailure, gather
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import Completion, Engines, Request
from rlhf3d.trainer.canary import Canary

R = TypeVar("R")

_LOG = logging.getLogger(__name__)


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
        note: Callable[[str], None],
        patience: Patience,
    ) -> None:
        """Open the stream between all processes.

        `note` writes a line to the console; `patience` says when the training ranks are at work.
        """
        self.config, self.setup = config, setup
        self.actor, self.rollout, self.canary = actor, rollout, canary
        self._phase, self._note, self.patience = phase, note, patience
        open_stream(setup, actor, rollout)
        self._stream: SyncSetup | None = setup
        """The open one; None where engines have started since."""
        self._sent = 0
        """Syncs of the open stream: both its ends number the slots of shared memory by it."""
        self.trained_version = 0
        """Version of the actor's weights: the number of its updates."""
        self.served_version: int | None = None
        """Version that the engines serve; None where they hold no weights."""
        self.syncs = 0
        """How often the engines got weights that they lacked."""
        self.restarts = 0
        """Engines that died."""
        self.failure: WorkerFailure | None = None
        """Of the engines, found where the training ranks, who have to send weights, were busy."""

    @property
    def engines(self) -> Engines:
        """The engines, which outlive the death of their processes."""
        return _LastingEngines(self)

    def weights_changed(self) -> None:
        """The actor was updated: what the engines hold is old."""
        self.trained_version += 1

    def sleep_engines(self) -> None:
        """Leave the engines' memory to the updates, where the configuration says so."""
        if self.config.sleep:
            self._lasting(self.rollout.sleep)
            # Asleep they serve nothing: the next use must send the weights again.
            self.served_version = None

    def sync_weights(self) -> dict[str, float]:
        """Give the engines the newest weights where they lack them; the phase's metrics.

        Raises CanaryError or WorkerFailure, and then nothing serves the new version.
        """
        if self.served_version == self.trained_version:
            return {}
        with self._phase("sync_weights"):
            metrics = self._lasting(partial(self._sync, self.syncs))
            self.syncs += 1
            return metrics

    def restore(self, failure: WorkerFailure) -> None:
        """Have the engines serve again what they served before `failure`, and go on with it.

        Where the actor was updated since then, they serve its newest weights instead: no others
        exist. Raises `failure` where it is not the death of an engine's process, or is one too
        many.
        """
        before = self.served_version
        self._start_again(failure)
        # Again what the last sync did: its canary too leaves its traces in a prefix cache.
        number = self.syncs - 1
        if before != self.trained_version:
            self._note(
                f"the weights after update {before} are gone: those after {self.trained_version} "
                "write what the engines had not answered"
            )
            number, self.syncs = self.syncs, self.syncs + 1
        self._lasting(partial(self._sync, number, again=True))

    def _lasting(self, work: Callable[[], R]) -> R:
        """Do some work of the engines; where one dies in it, they are started again, and so is it.

        Raises WorkerFailure as `restore`.
        """
        while True:
            try:
                return work()
            except WorkerFailure as failure:
                self._start_again(failure)

    def _start_again(self, failure: WorkerFailure) -> None:
        lost = self.rollout.lost()
        if not lost or self.restarts + len(lost) > self.config.engine_restarts:
            raise failure
        self.restarts += len(lost)
        limit = f"{self.restarts} of rollout.engine_restarts={self.config.engine_restarts}"
        _LOG.warning("engines died: %s\n%s", lost, failure)
        self._note(f"warning: {', '.join(lost)} died: all engines are started again ({limit})")
        self.served_version = None
        self.failure = None
        self.rollout.restart()
        if self._stream is not None:
            self.actor.call_all("close weight stream", TrainWorker.close_stream, self._stream.name)
        self._stream = None

    def _sync(self, number: int, again: bool = False) -> dict[str, float]:
        """Send the newest weights, check and publish them, as sync `number` of the run."""
        # One that died while it had nothing to do would be found by the senders' deadline.
        if lost := self.rollout.lost():
            raise WorkerFailure(f"sync_weights: {lost}")
        if self._stream is None:
            # A name of its own: shared memory goes by it.
            setup = replace(self.setup, name=f"{self.setup.name}-{self.restarts}")
            open_stream(setup, self.actor, self.rollout)
            self._stream, self._sent = setup, 0
        version = self.trained_version
        metrics = self._send(self._stream.name, version)
        # Loaded and not published yet: where the canary fails, nothing was served.
        if self.canary.due(number):
            metrics["sync/canary_abs_diff"] = self.canary.check(version)
        self.rollout.publish(version, again)
        self.served_version = version
        return metrics

    def _send(self, stream: str, version: int) -> dict[str, float]:
        """Move the weights; the engines have loaded them afterwards and do not serve them yet."""
        # Both sides start before either is waited for: each blocks until the other answers.
        loads = self.rollout.start_update_weights(version, self._sent)
        # Nobody may ask for anything before `publish`, also who does so while this waits.
        self.served_version = None
        sends = self.actor.start_all(TrainWorker.send_weights, stream, version, self._sent)
        self._sent += 1
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


class _LastingEngines:
    """The engines as those see them who ask for completions."""

    def __init__(self, weights: WeightSync) -> None:
        self._weights = weights

    def submit(self, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`."""
        self._weights.rollout.submit(requests)

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        """See `Engines.poll`; where an engine dies, its requests are given again.

        In the background that waits until the foreground; there are no completions until then.
        """
        weights = self._weights
        if weights.failure is None:
            try:
                return weights.rollout.poll(timeout_s)
            except WorkerFailure as failure:
                weights.failure = failure
        if not weights.patience.background:
            weights.restore(weights.failure)
        return {}

    def abort(self, numbers: Collection[int]) -> None:
        """See `Engines.abort`."""
        self._weights.rollout.abort(numbers)


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
