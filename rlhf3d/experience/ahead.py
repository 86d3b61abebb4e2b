"""The experience of each step, drawn up to `staleness` steps ahead of the training.

Invariant: step t's batch is written whole by the weights after step max(0, t - 1 - staleness), when
it is drawn and waited for changes no number: two runs, or a run that was stopped and resumed, draw
the same. With a staleness of 0 that is the policy that is trained next, and nothing runs ahead.
Runs in: driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.saved import Queued, QueuedBatch, load_queue, save_queue
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.source import NO_EXPERIENCE, Draws
from rlhf3d.experience.steps import FIRST_PHASE, Patience, Phase, Steps


@dataclass
class _Draw:
    """The batch that is being made."""

    step: int
    """It is trained on in."""
    steps: Steps[Experience]
    began: float
    phase: str = FIRST_PHASE
    """It goes on in."""
    waited_s: float = 0.0
    """Seconds that the trainer waited for it."""


class Ahead:
    """Hands a batch to each step, and has the next ones written meanwhile.

    Between two steps it gives the engines the new weights, once all that older ones have to write
    is complete: with a staleness of 1 before the step begins, above that before the step's update.
    """

    def __init__(
        self,
        source: Draws,
        sync_weights: Callable[[], dict[str, float]],
        patience: Patience,
        phase: Phase,
        staleness: int,
        last_step: int,
        prompt_of: Callable[[int], Prompt],
    ) -> None:
        """`sync_weights` gives the engines the newest weights where they lack them; its metrics.

        `prompt_of` gives the training prompt of a row by its number.
        """
        self._source, self._sync_weights = source, sync_weights
        self._patience, self._phase = patience, phase
        self._staleness, self._last_step = staleness, last_step
        self._prompt_of = prompt_of
        self._served: int | None = None
        """The engines serve the weights after this step; none before the first batch is wanted."""
        self._drawn = 0
        """The step of the last batch that is complete."""
        self._draw: _Draw | None = None
        self._ready: dict[int, Experience] = {}
        """Complete batches that no step has taken, by step."""
        self._failure: Exception | None = None
        """Why there is no batch after the last one."""
        self._state = source.state_dict()
        """The position after the last complete batch."""
        self._metrics: dict[str, float] = {}
        self._idle_since: float | None = None
        """When the engines had written all that their weights have to."""
        self._engines_waited_s = 0.0
        """Seconds that they have since waited for other weights."""
        self._going_on = False
        self.settle_s = 0.0
        """See `ExperienceSource`: as long as the last batch took."""

    def close(self) -> None:
        """Give up what is under way."""
        if self._draw is not None:
            self._draw.steps.close()
        self._draw = None

    def next_batch(self, step: int) -> Experience:
        """The experience of a step. Raises what its drawing raised."""
        self._drawn = max(self._drawn, step - 1)  # after a resume none before it is drawn
        if self._served is None:
            self._serve(step - 1)
        # Without staleness the step's own batch needs the weights first.
        self._finish(min(step, self._written_before(step)))
        if self._drawn >= self._written_before(step):
            self._serve(step - 1)
        self._finish(step)
        if self._drawn < step:
            assert self._failure is not None
            raise self._failure
        experience = self._ready.pop(step)
        metrics, self._metrics = self._metrics, {}
        self.go_on()  # the next requests go out now, and not only when ranks are waited for
        return replace(experience, metrics=metrics | experience.metrics)

    def before_update(self, step: int) -> None:
        """Give the engines the weights that the step's update is about to replace."""
        self._finish(self._written_before(step))
        self._serve(step - 1)

    def settle(self, step: int) -> None:
        """Complete all that is written by weights of before the end of a step, which is complete.

        Afterwards the engines may get other weights, and the state may be saved.
        """
        if self._served is not None:
            self._finish(self._written_before(step + 1))

    def go_on(self) -> bool:
        """Draw ahead, waiting for nothing; whether there is more to do."""
        if self._going_on:  # it waits itself, for ranks that score
            return False
        with self._patience.none():
            return self._go_on()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last complete batch, as JSON."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that `state` was taken after."""
        self._source.load_state_dict(state)
        self._state = self._source.state_dict()

    def save(self, folder: Path) -> None:
        """Write the batches that are ahead to the new folder; makes none where there are none."""
        assert self._draw is None, "a batch is being written"
        batches = []
        for step, experience in sorted(self._ready.items()):
            versions = [one.trajectory.oldest_version for one in experience.trajectories]
            batches.append(QueuedBatch(step, min(versions), experience))
        if batches:
            save_queue(folder, Queued(tuple(batches)))

    def load(self, folder: Path) -> None:
        """Continue with what `save` wrote, after `load_state_dict`.

        ValueError where the data are others than those it was written with.
        """
        for batch in load_queue(folder, self._prompt_of).batches:
            self._ready[batch.number] = batch.experience
            self._drawn = batch.number

    def _written_before(self, step: int) -> int:
        """The last batch that is written before the weights which that step begins with."""
        return min(step - 1 + self._staleness, self._last_step)

    def _serve(self, step: int) -> None:
        """Have the weights after a step write what comes next."""
        if self._served == step:
            return
        assert self._draw is None, "other weights would enter in the middle of a batch"
        self._metrics |= self._sync_weights()
        self._served = step

    def _finish(self, step: int) -> None:
        """Wait until the batch of a step is complete, or there is none."""
        while self._drawn < step and self._failure is None:
            if self._draw is None:
                assert self._begin(), "a batch whose weights are not served"
            draw, began = self._draw, time.monotonic()
            assert draw is not None
            with self._phase(name := draw.phase):
                while self._draw is draw and draw.phase == name:
                    self._go_on()
            draw.waited_s += time.monotonic() - began

    def _go_on(self) -> bool:
        if self._draw is None and not self._begin():
            return False
        draw = self._draw
        assert draw is not None
        self._going_on = True
        try:
            draw.phase = next(draw.steps)
            return True
        except StopIteration as end:
            self._complete(draw, end.value)
        except NO_EXPERIENCE as error:
            # Raised where the batch is wanted: the steps before it have theirs.
            self._failure, self._draw = error, None
        finally:
            self._going_on = False
        return self._begin()

    def _begin(self) -> bool:
        """Begin the next batch, if the engines serve the weights that write it."""
        step, served = self._drawn + 1, self._served
        if served is None or self._failure is not None or step > self._written_before(served + 2):
            return False
        if step > self._last_step:
            return False
        now = time.monotonic()
        self._draw = _Draw(step, self._source.draw(step), now)
        if self._idle_since is not None:
            self._engines_waited_s += now - self._idle_since
        self._idle_since = None
        return True

    def _complete(self, draw: _Draw, experience: Experience) -> None:
        now = time.monotonic()
        drawn_s = max(now - draw.began, 1e-9)
        metrics = {
            "async/drawn_s": drawn_s,
            "async/trainer_waited_s": draw.waited_s,
            "async/engines_waited_s": self._engines_waited_s,
            "async/overlap_share": 1 - min(1.0, draw.waited_s / drawn_s),
        }
        if self._staleness:
            self.settle_s = drawn_s
            experience = replace(experience, metrics=experience.metrics | metrics)
        self._ready[draw.step] = experience
        self._drawn, self._state = draw.step, self._source.state_dict()
        self._draw, self._idle_since, self._engines_waited_s = None, now, 0.0
