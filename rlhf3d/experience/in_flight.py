"""The experience of each step, from groups that are drawn one by one while weights change.

Invariant: no group is trained on whose first weights are more than `staleness` versions old, and
none is discarded for its age: groups are begun only where all that are under way can still be
trained on in time, and a step waits for those that could not be later. Oldest are trained on first.
Runs in: driver.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environment_runner import check_failures
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.experience.saved import Queued, QueuedBatch, load_queue, save_queue
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.source import NO_EXPERIENCE, OnPolicy, TooFewGroups, no_complete_group
from rlhf3d.experience.steps import BRIEF_S, FIRST_PHASE, Patience, Phase, Steps
from rlhf3d.placement.script import Script
from rlhf3d.rewards.score import Outcome, check_outcomes
from rlhf3d.rollout.api import POLL_S
from rlhf3d.rollout.desk import Desks


@dataclass(frozen=True)
class InFlightSettings:
    """How much is under way."""

    groups: int
    """Groups a step trains on."""
    trajectories: int
    """A group's, greedy ones included."""
    staleness: int
    """The oldest version that a token may be of, counted back from the version being trained."""
    last_step: int
    max_scoring_failures: float = 1.0
    """Share of a step's trajectories whose scoring may fail."""
    max_environment_failures: float = 1.0
    """Share of a step's trajectories whose environment may fail."""
    max_trajectories: int | None = None
    """Trajectories that may be under way at once: of environments; null for any number."""
    metric: str | None = None
    """What the trajectories of a group must differ in to be trained on (dynamic sampling)."""
    max_generated: int | None = None
    """Groups that may be generated for a step before it counts as impossible to fill."""


@dataclass
class _Group:
    """A group that is under way, or complete."""

    number: int
    """They are begun in this order."""
    version: int
    """Served when it was begun."""
    requests: Sequence[TrajectoryRequest]
    steps: Steps[Experience] | None = None
    phase: str = FIRST_PHASE
    experience: Experience | None = None
    """Once it is complete."""


class InFlight:
    """Keeps groups under way all the time, and hands complete ones to each step."""

    settle_s = 0.0
    """See `ExperienceSource`: nothing is waited for."""

    def __init__(
        self,
        settings: InFlightSettings,
        source: OnPolicy,
        collector: Collector,
        desks: Desks,
        sync_weights: Callable[[], dict[str, float]],
        trained_version: Callable[[], int],
        served_version: Callable[[], int | None],
        patience: Patience,
        phase: Phase,
        prompt_of: Callable[[int], Prompt],
        script: Script | None = None,
    ) -> None:
        """`sync_weights` gives the engines the newest weights, which enter while requests run.

        `prompt_of` gives the training prompt of a row by its number. `script`: a run that is
        repeated, which says what each step trains on.
        """
        self._settings, self._source, self._collector = settings, source, collector
        self._desks, self._sync_weights = desks, sync_weights
        self._trained_version, self._served_version = trained_version, served_version
        self._patience, self._phase, self._prompt_of = patience, phase, prompt_of
        self._script = script
        self._waiting: deque[list[TrajectoryRequest]] = deque()
        """Groups that are drawn from the data and not begun."""
        self._running: list[_Group] = []
        self._complete: list[_Group] = []
        self._training = 0
        """Groups that the step under way trains on."""
        self._batches = self._groups = self._handed_over = 0
        """Batches drawn from the data, groups in them, and groups that steps have had."""
        self._begun = False
        self._ended = _Ended()
        self._loaded_ends: list[int] = []
        """Groups of the checkpoint whose ends the next batch reports."""
        self._failure: Exception | None = None
        self._going_on = False
        self._since = time.monotonic()
        self._idle_since: float | None = None
        """When the last group under way was complete."""
        self._engines_waited_s = 0.0
        """Seconds without any, since the last batch."""

    def close(self) -> None:
        """Give up what is under way."""
        for group in self._running:
            assert group.steps is not None
            group.steps.close()
        self._running = []

    def next_batch(self, step: int) -> Experience:
        """The experience of a step. Raises what drawing it raised."""
        # What the step before trained on is in the weights that enter now.
        self._training, self._begun = 0, True
        metrics = self._sync_weights()
        began = time.monotonic()
        with self._phase(FIRST_PHASE):
            while (batch := self._batch(step)) is None:
                if self._failure is not None:
                    raise self._failure
                self._round()
        waited_s = time.monotonic() - began
        self._complete = [group for group in self._complete if group not in batch]
        self._training = len(batch)
        self._handed_over += len(batch)
        self.go_on()
        return self._handed(step, batch, metrics, waited_s)

    def before_update(self, step: int) -> None:
        """Nothing: engines have the newest weights."""

    def settle(self, step: int) -> None:
        """Nothing: weights may enter at any time, and what is unfinished is begun again."""

    def go_on(self) -> bool:
        """Draw, waiting for nothing; whether there is more to do."""
        if self._going_on or not self._begun or self._failure is not None:
            return False
        if self._served_version() is None:  # other weights are just entering the engines
            return False
        with self._patience.none():
            self._round()
        return bool(self._running)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data and the counts of what was drawn, as JSON."""
        counts = {
            "batches": self._batches,
            "groups": self._groups,
            "handed_over": self._handed_over,
            "ended": self._unreported,
        }
        return {**self._source.state_dict(), "in_flight": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step that `state` was taken after."""
        self._source.load_state_dict(state)
        counts = state.get("in_flight")
        if counts is None:  # until now each step drew its own batch, and was named after it
            step: int = state["step"]
            counts = {"batches": step, "groups": 0, "handed_over": step * self._settings.groups}
        self._batches, self._groups = counts["batches"], counts["groups"]
        self._handed_over = counts["handed_over"]
        # Checkpoints of earlier versions do not have them.
        self._loaded_ends = counts.get("ended", [])

    def save(self, folder: Path) -> None:
        """Write complete groups, those whose end no step has reported, and the others' requests."""
        version = self._trained_version()  # of no consequence where nothing is trained on
        ended = {
            number: QueuedBatch(number, version, self._ended.groups[number])
            for number in self._unreported
        }
        for group in self._complete:
            assert group.experience is not None
            ended[group.number] = QueuedBatch(group.number, group.version, group.experience)
        batches = [ended[number] for number in sorted(ended)]
        requests = [*chain.from_iterable(group.requests for group in self._running)]
        requests += chain.from_iterable(self._waiting)
        if batches or requests:
            save_queue(folder, Queued(tuple(batches), tuple(requests)))

    def load(self, folder: Path) -> None:
        """Continue with what `save` wrote, after `load_state_dict`."""
        queued = load_queue(folder, self._prompt_of)
        for batch in queued.batches:
            self._keep(_Group(batch.number, batch.version, ()), batch.experience)
            self._ended.groups[batch.number] = batch.experience
        self._ended = self._ended.take(self._loaded_ends)
        of_group: dict[int, list[TrajectoryRequest]] = {}
        for request in queued.requests:
            # As the configuration has it by now: a shorter context has no room for longer answers.
            request = replace(request, sampling=self._source.sampling)
            of_group.setdefault(request.group, []).append(request)
        self._waiting.extend(of_group.values())

    @property
    def _unreported(self) -> list[int]:
        """Groups that came to their end since the last batch, for the step after a resume to
        report; after a failure its message has, and a resume begins to count again.
        """
        return [] if self._failure is not None else list(self._ended.groups)

    def _round(self) -> None:
        """Begin what may begin, and take every group as far as it goes; waits at most once."""
        self._going_on = True
        try:
            self._begin_groups()
            # Scores and environments' replies come from elsewhere.
            brief = self._collector.runner is not None or any(
                group.phase != FIRST_PHASE for group in self._running
            )
            with self._desks.fetched(self._patience.of(BRIEF_S if brief else POLL_S)):
                for group in list(self._running):
                    self._advance(group)
        except NO_EXPERIENCE as error:
            # Raised where the next batch is wanted.
            self._failure = error
        finally:
            self._going_on = False

    def _advance(self, group: _Group) -> None:
        assert group.steps is not None
        # Only a reward model's scores are waited for here: its ranks are busy in the background.
        waits = self._collector.rewards.model is not None and group.phase != FIRST_PHASE
        try:
            if waits:
                group.phase = next(group.steps)
            else:
                with self._patience.none():
                    group.phase = next(group.steps)
        except StopIteration as end:
            self._running.remove(group)
            if not self._running:
                self._idle_since = time.monotonic()
            self._take(group, end.value)

    def _take(self, group: _Group, experience: Experience) -> None:
        """Keep a group that has ended, unless it is not to be trained on."""
        self._ended.groups[group.number] = experience
        self._keep(group, experience)
        self._tell_script(experience, group.experience is not None)
        if self._script is not None:
            return  # more may have ended by now than in the run, which went on
        scores = [one.score for one in (*experience.trajectories, *experience.left_out)]
        if any(score.failed or score.unfinished for score in scores):  # else none is one too many
            self._check_failures()
        limit, ended = self._settings.max_generated, len(self._ended.groups)
        # While ranks train, more may end than one step needs.
        lacking = len(self._complete) < self._settings.groups
        if limit is not None and ended > limit and lacking:
            raise TooFewGroups(self._ended.too_few(limit, self._settings.metric))

    def _keep(self, group: _Group, experience: Experience) -> None:
        if experience.trajectories and not self._has_signal(experience):
            self._ended.without_signal.add(group.number)
        elif experience.trajectories:
            group.experience = experience
            self._complete.append(group)

    def _check_failures(self) -> None:
        """Raise where too much of what has ended since the last batch failed.

        One group is too few to tell.
        """
        settings, ended = self._settings, list(self._ended.groups.values())
        scores = []
        for group in ended:
            scores += [one.score for one in (*group.trajectories, *group.left_out)]
        total = max(len(scores), settings.groups * settings.trajectories)
        environments = [s for s in scores if s.outcome in (Outcome.ENV_ERROR, Outcome.ENV_TIMEOUT)]
        check_failures(environments, settings.max_environment_failures, total)
        check_outcomes(scores, settings.max_scoring_failures, total)
        if len(ended) >= settings.groups and not any(group.trajectories for group in ended):
            raise no_complete_group(self._ended.left_out)

    def _has_signal(self, experience: Experience) -> bool:
        """Whether a group is one to train on, where dynamic sampling chooses."""
        metric = self._settings.metric
        if metric is None:
            return True
        values, ids = experience.metric(metric), experience.group_ids
        return bool(groups_with_signal(values, experience.written, ids).any())

    def _tell_script(self, experience: Experience, kept: bool) -> None:
        """Have the run that is repeated look whether it asked for more of these trajectories, and,
        where they are not `kept`, whether it trained on them.
        """
        if self._script is None:
            return
        ended = (*experience.trajectories, *experience.left_out)
        names = [one.trajectory.name for one in ended]
        for name in names:
            self._script.ended(name)
        if not kept:
            self._script.not_trained(names)

    def _begin_groups(self) -> None:
        """Begin groups as long as all under way can be trained on in time."""
        settings = self._settings
        while self._has_room():
            if not self._waiting:
                self._draw_batch()
            requests = self._waiting.popleft()
            collector = replace(
                self._collector,
                engines=self._desks.open(),
                judged_by=settings.groups * settings.trajectories,
            )
            steps, version = self._source.draw_group(requests, collector), self._served_version()
            assert version is not None, "engines get weights before anything is drawn"
            self._engines_at_work(None)
            self._running.append(_Group(requests[0].group, version, requests, steps))

    def _engines_at_work(self, idle_since: float | None) -> None:
        """Count how long they had nothing to do until now."""
        if self._idle_since is not None:
            self._engines_waited_s += time.monotonic() - self._idle_since
        self._idle_since = idle_since

    def _has_room(self) -> bool:
        settings = self._settings
        under_way = len(self._running) + len(self._complete)
        if under_way + self._training >= (settings.staleness + 1) * settings.groups:
            return False
        if self._handed_over + under_way >= settings.last_step * settings.groups:
            return False  # the run ends before
        trajectories = (len(self._running) + 1) * settings.trajectories
        most = settings.max_trajectories
        return most is None or trajectories <= most or not self._running

    def _draw_batch(self) -> None:
        """Take the data's next prompts, whose groups get numbers of their own."""
        self._batches += 1
        of_group: dict[int, list[TrajectoryRequest]] = {}
        for request in self._source.next_requests(self._batches):
            of_group.setdefault(request.group, []).append(request)
        for requests in of_group.values():
            self._waiting.append([replace(one, group=self._groups) for one in requests])
            self._groups += 1

    def _batch(self, step: int) -> list[_Group] | None:
        """The groups that a step trains on; none while it has to wait."""
        if self._script is not None:
            return self._scripted_batch(step, self._script)
        settings, version = self._settings, self._trained_version()
        oldest = sorted(self._complete, key=lambda group: (group.version, group.number))
        batch = oldest[: settings.groups]
        if len(batch) < settings.groups:
            return None
        # Those that `later` further steps must be through with are more than these can take.
        oldest_due = version - settings.staleness
        for due in range(max(0, oldest_due), version + 1):
            later = due - oldest_due
            under_way = sum(g.version <= due for g in chain(self._complete, self._running))
            taken = sum(group.version <= due for group in batch)
            if under_way - taken > later * settings.groups:
                return None
        return batch

    def _scripted_batch(self, step: int, script: Script) -> list[_Group] | None:
        """The groups that the step trained on in the run that is repeated, in their order.

        None until these are complete, and all have ended that had when it trained on them.
        """
        names = script.trajectories(step)
        if not self._ended.groups.keys() >= set(script.groups_ended(step)):
            return None
        by_name: dict[str, _Group] = {}
        for group in self._complete:
            assert group.experience is not None
            own = [one.trajectory.name for one in group.experience.trajectories]
            by_name |= dict.fromkeys(own, group)
        if any(name not in by_name for name in names):
            return None
        batch = {by_name[name].number: by_name[name] for name in names}
        return list(batch.values())

    def _handed(
        self, step: int, batch: Sequence[_Group], metrics: dict[str, float], waited_s: float
    ) -> Experience:
        now = time.monotonic()
        drawn_s, self._since = max(now - self._since, 1e-9), now
        self._engines_at_work(None if self._running else now)
        engines_waited_s, self._engines_waited_s = self._engines_waited_s, 0.0
        rows: list[ScoredTrajectory] = []
        for group in batch:
            assert group.experience is not None
            rows += group.experience.trajectories
        numbers = list(self._ended.groups)
        if self._script is not None:
            numbers = list(self._script.groups_ended(step))
        ended = self._ended.take(numbers)
        metrics = {
            **metrics,
            "async/drawn_s": drawn_s,
            "async/trainer_waited_s": waited_s,
            "async/engines_waited_s": engines_waited_s,
            "async/overlap_share": 1 - min(1.0, waited_s / drawn_s),
            "async/groups_complete": float(len(self._complete)),
            "async/groups_running": float(len(self._running)),
        }
        if self._settings.metric is not None:
            metrics |= ended.figures(len(batch))
        return Experience(rows, metrics, ended.left_out, ended.lengths, numbers)


@dataclass
class _Ended:
    """Groups that came to their end since the last batch."""

    groups: dict[int, Experience] = field(default_factory=dict)
    """By number, in the order of their ends: with what is trained on, or nothing but left out."""
    without_signal: set[int] = field(default_factory=set)
    """Numbers of those that dynamic sampling leaves out."""

    def take(self, numbers: Sequence[int]) -> _Ended:
        """Take those out; they are in the order of `numbers`."""
        taken = _Ended({number: self.groups.pop(number) for number in numbers})
        taken.without_signal = self.without_signal & taken.groups.keys()
        self.without_signal -= taken.without_signal
        return taken

    @property
    def left_out(self) -> list[ScoredTrajectory]:
        """Of groups in which one came to no end."""
        return [*chain.from_iterable(one.left_out for one in self.groups.values())]

    @property
    def lengths(self) -> list[int]:
        """Response tokens of all trajectories."""
        return [*chain.from_iterable(one.all_lengths for one in self.groups.values())]

    def figures(self, groups: int) -> dict[str, float]:
        """Metrics of dynamic sampling, for a step of so many groups."""
        ended = len(self.groups)
        figures = {
            "filter_groups/generated": float(ended),
            "filter_groups/kept_share": 1 - len(self.without_signal) / max(1, ended),
            "train/num_gen_batches": ended / groups,
            "perf/generated_tokens": float(sum(self.lengths)),
        }
        # A step may be of groups that all ended before the last one.
        if rewards := [group.rewards for group in self.groups.values()]:
            figures["filter_groups/generated_score/mean"] = float(torch.cat(rewards).mean())
        return figures

    def too_few(self, limit: int, metric: str | None) -> str:
        """Why a step cannot be filled."""
        return (
            f"algorithm.filter_groups: of {len(self.groups)} groups that ended for one step "
            f"{len(self.without_signal)} do not differ in {metric}, and more than {limit} are not "
            "generated (algorithm.filter_groups.max_num_gen_batches x data.gen_batch_size): use "
            "prompts that are neither too hard nor solved by now, raise rollout.n or "
            "max_num_gen_batches, or set algorithm.filter_groups.enable=false"
        )
