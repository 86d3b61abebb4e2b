"""How a step's experience is made: generation, and dynamic sampling around it.

Invariant: a source's state is the position after the last batch that it handed over, not after what
it drew from the data since; a run that continues from it draws the same prompts again.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.algorithms.rewards import overlong_penalty
from rlhf3d.config.schema import FilterGroupsConfig, OverlongBufferConfig
from rlhf3d.data.loader import PromptLoader
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environment_runner import EnvironmentFailed
from rlhf3d.experience.requests import Requests, TrajectoryRequest, greedy_sampling
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.steps import Steps
from rlhf3d.rewards.score import RewardError, one_screen
from rlhf3d.rollout.api import SamplingSettings


class ExperienceSource(Protocol):
    """What the trainer asks for the experience of each step."""

    settle_s: float
    """Seconds that `settle` may take, by what was made before."""

    def next_batch(self, step: int) -> Experience:
        """The experience of a step. Raises what making it raised."""

    def before_update(self, step: int) -> None:
        """The step's update is about to replace the weights: engines may need them before."""

    def settle(self, step: int) -> None:
        """Complete what must be, before the engines get the weights after a step for another use,
        or the state after it is saved.
        """

    def go_on(self) -> bool:
        """Go on with what is made ahead, waiting for nothing; whether there is more to do."""

    def close(self) -> None:
        """Give up what is under way."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and what else a continued run needs, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step that `state` was taken after."""

    def save(self, folder: Path) -> None:
        """Write what is ahead to the new folder `folder`; makes none where nothing is."""

    def load(self, folder: Path) -> None:
        """Continue with what `save` wrote, after `load_state_dict`.

        ValueError where the data are others than those it was written with.
        """


class Draws(Protocol):
    """What makes the experience of one step after the other; they wrap one another."""

    def draw(self, step: int) -> Steps[Experience]:
        """Experience for a step; asked again within the same step, more of it."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed over, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that `state` was taken after."""


@dataclass(frozen=True)
class OnPolicySettings:
    """How many trajectories are drawn, and what they earn besides their score."""

    n: int
    """Trajectories a prompt."""
    sampling: SamplingSettings
    seed: int
    """Of the run."""
    greedy_baseline: bool = False
    """Whether each group also gets a greedy answer, which its rewards are compared with (ReMax)."""
    overlong: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)


class OnPolicy:
    """Trajectories of the policy that the engines serve."""

    def __init__(
        self,
        settings: OnPolicySettings,
        loader: PromptLoader,
        collector: Collector,
        served_version: Callable[[], int | None],
    ) -> None:
        """`served_version`: of the policy that the engines serve."""
        self._settings, self._loader, self._collector = settings, loader, collector
        self._served_version = served_version
        self._requests: Requests | None = None

    @property
    def sampling(self) -> SamplingSettings:
        """Of its requests."""
        return self._settings.sampling

    def draw(self, step: int) -> Steps[Experience]:
        """`n` scored trajectories of each of the loader's next prompts."""
        # Asked again within a step, the same object counts on: a prompt that comes again in it gets
        # other seeds and a group of its own.
        if self._requests is None or self._requests.step != step:
            self._requests = Requests(self._settings.seed, step)
        rows, baselines = yield from self._answers(self._requests_of(self._requests))
        (rows, baselines), left_out = complete_groups(rows, baselines)
        return Experience(_with_baselines(rows, baselines), left_out=left_out)

    def next_requests(self, number: int) -> list[TrajectoryRequest]:
        """Those for the loader's next prompts, which are its batch `number`."""
        return self._requests_of(Requests(self._settings.seed, number))

    def draw_group(
        self, requests: Sequence[TrajectoryRequest], collector: Collector
    ) -> Steps[Experience]:
        """The answers to the requests of one group, or none where it is not complete.

        `collector`: one of its own, as many groups are drawn at the same time.
        """
        rows, baselines = yield from self._answers(requests, collector)
        (rows, baselines), left_out = without_broken_groups(rows, baselines)
        return Experience(_with_baselines(rows, baselines), left_out=left_out)

    def _requests_of(self, requests: Requests) -> list[TrajectoryRequest]:
        settings = self._settings
        return requests.draw(self._loader.next_batch(), settings.n, settings.sampling)

    def _answers(
        self, requests: Sequence[TrajectoryRequest], collector: Collector | None = None
    ) -> Steps[tuple[list[ScoredTrajectory], list[ScoredTrajectory]]]:
        """The rewarded trajectories, and the greedy ones that they are compared with."""
        version = self._served_version()
        assert version is not None, "engines get weights before anything is drawn"
        greedy = self._greedy_requests(requests) if self._settings.greedy_baseline else []
        # The greedy answers go last, so that the split below is by position, and get the overlong
        # penalty too: what a reward is compared with must be made like it.
        rows = self._rewarded(
            (yield from (collector or self._collector).steps([*requests, *greedy]))
        )
        # Of one that came to no end, nothing may have been written.
        self._check_versions([row for row in rows if not row.score.unfinished], version)
        return rows[: len(requests)], rows[len(requests) :]

    def state_dict(self) -> dict[str, Any]:
        """See `Draws`. `loader`: the position in the data."""
        return {"loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Draws`."""
        self._loader.load_state_dict(state["loader"])

    def _greedy_requests(self, requests: Sequence[TrajectoryRequest]) -> list[TrajectoryRequest]:
        """One greedy request for each group."""
        sampling = greedy_sampling(self._settings.sampling.max_tokens)
        first_of_group: dict[int, TrajectoryRequest] = {}
        for request in requests:
            first_of_group.setdefault(request.group, request)
        return [
            replace(request, sampling=sampling, name=f"{request.name}.greedy")
            for request in first_of_group.values()
        ]

    def _rewarded(self, rows: list[ScoredTrajectory]) -> list[ScoredTrajectory]:
        """Rows with the penalty on overlong responses in their rewards."""
        buffer, experience = self._settings.overlong, Experience(rows)
        if not buffer.enable:
            return rows
        max_tokens = self._settings.sampling.max_tokens
        penalty = overlong_penalty(
            experience.lengths, max_tokens, buffer.len, buffer.penalty_factor
        )
        rewards = (experience.rewards + penalty).tolist()
        return [replace(row, reward=reward) for row, reward in zip(rows, rewards, strict=True)]

    def _check_versions(self, rows: Sequence[ScoredTrajectory], first: int) -> None:
        """All tokens are of the policy that was served at first, or came in its place."""
        last = self._served_version()
        assert last is not None
        for row in rows:
            oldest, newest = row.trajectory.oldest_version, row.trajectory.newest_version
            assert first <= oldest <= newest <= last, (
                f"tokens of policies {oldest} to {newest} where {first} to {last} were served"
            )


def complete_groups(
    *parts: Sequence[ScoredTrajectory],
) -> tuple[list[list[ScoredTrajectory]], list[ScoredTrajectory]]:
    """The rows of each part whose groups are complete, and the other rows of all parts.

    EnvironmentFailed where no group is. Of a group in which one came to no end (its environment
    failed, say) nothing is trained on: what is left of it would be compared with fewer others, and
    with those that gave no trouble.
    """
    kept, left_out = without_broken_groups(*parts)
    if left_out and not any(kept):
        raise no_complete_group(left_out)
    return kept, left_out


def no_complete_group(left_out: Sequence[ScoredTrajectory]) -> EnvironmentFailed:
    """What to raise where these are all there is."""
    failed = [row.score for row in left_out if row.score.unfinished]
    return EnvironmentFailed(
        f"every group has a trajectory that came to no end ({len(failed)} of "
        f"{len(left_out)}). The first:\n{one_screen(failed[0].message or 'no message')}\n"
        "Fix the environment, or raise environment.call_timeout_s, trajectory_timeout_s or "
        "retries, or data.max_prompt_length where prompts are too long."
    )


def without_broken_groups(
    *parts: Sequence[ScoredTrajectory],
) -> tuple[list[list[ScoredTrajectory]], list[ScoredTrajectory]]:
    """As `complete_groups`, which may be none."""
    together = list(chain.from_iterable(parts))
    broken = {row.trajectory.group for row in together if row.score.unfinished}
    kept = []
    for part in parts:
        kept.append([row for row in part if row.trajectory.group not in broken])
    return kept, [row for row in together if row.trajectory.group in broken]


def _with_baselines(
    rows: Sequence[ScoredTrajectory], baselines: Sequence[ScoredTrajectory]
) -> list[ScoredTrajectory]:
    """Each row with the reward of its group's greedy answer; as it is where there are none."""
    if not baselines:
        return list(rows)
    reward_of = {baseline.trajectory.group: baseline.reward for baseline in baselines}
    return [replace(row, greedy_reward=reward_of[row.trajectory.group]) for row in rows]


class TooFewGroups(RuntimeError):
    """A step could not be filled: the prompts are too hard, or solved."""


NO_EXPERIENCE = (TooFewGroups, EnvironmentFailed, RewardError)
"""What a run that has been going well may end with through its data or the user's code, before a
weight is changed."""


class DynamicSampling:
    """Draws from another source until a step has enough groups with signal.

    DAPO, arXiv 2503.14476, section 3.2. Surplus groups are dropped: the next step
    has another policy.
    """

    def __init__(self, source: Draws, config: FilterGroupsConfig, groups: int) -> None:
        """`groups`: how many a step trains on."""
        self._source, self._config, self._groups = source, config, groups
        self._state = source.state_dict()

    def draw(self, step: int) -> Steps[Experience]:
        """The first groups whose rows differ in `metric`; TooFewGroups without enough of them."""
        found = _Draws(self._config.metric)
        while len(found.groups) < self._groups:
            # `_state` then still is the position before this step's first batch, so
            # the continued run draws the same prompts again.
            if found.batches == self._config.max_num_gen_batches:
                raise TooFewGroups(self._too_few(found))
            found.add((yield from self._source.draw(step)))
        rows = list(chain.from_iterable(found.groups[: self._groups]))
        self._state = self._source.state_dict()
        return Experience(rows, self._figures(found), found.left_out, found.lengths)

    def state_dict(self) -> dict[str, Any]:
        """See `Draws`."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Draws`."""
        self._source.load_state_dict(state)
        self._state = self._source.state_dict()

    def _figures(self, found: _Draws) -> dict[str, float]:
        return {
            "train/num_gen_batches": float(found.batches),
            "filter_groups/generated": float(found.generated),
            "filter_groups/kept_share": len(found.groups) / found.generated,
            "filter_groups/surplus": float(len(found.groups) - self._groups),
            "filter_groups/generated_score/mean": float(torch.cat(found.rewards).mean()),
            "perf/generated_tokens": float(sum(found.lengths)),
        }

    def _too_few(self, found: _Draws) -> str:
        rewards = torch.cat(found.rewards)
        return (
            f"algorithm.filter_groups: after {found.batches} batches only {len(found.groups)} of "
            f"{found.generated} groups differ in {self._config.metric}, {self._groups} are needed "
            f"(algorithm.filter_groups.max_num_gen_batches = {found.batches}). Scores are between "
            f"{rewards.min():g} and {rewards.max():g}, mean {rewards.mean():.3g}: use prompts that "
            "are neither too hard nor solved by now, raise rollout.n or max_num_gen_batches, or "
            "set algorithm.filter_groups.enable=false"
        )


class _Draws:
    """What the batches of one step held."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self.batches = self.generated = 0
        """Batches and groups, those without signal or left out included."""
        self.lengths: list[int] = []
        """Response tokens of every trajectory."""
        self.rewards: list[torch.Tensor] = []
        """Of every trajectory, by batch."""
        self.groups: list[list[ScoredTrajectory]] = []
        """The groups with signal, in the order drawn."""
        self.left_out: list[ScoredTrajectory] = []
        """Of groups in which one came to no end."""

    def add(self, drawn: Experience) -> None:
        ids = drawn.group_ids
        signal = groups_with_signal(drawn.metric(self._metric), drawn.written, ids)
        # `unique` sorts, as `groups_with_signal` does: the two align.
        kept = set(ids.unique()[signal].tolist())
        rows_of: dict[int, list[ScoredTrajectory]] = {}
        for row in drawn.trajectories:
            if row.trajectory.group in kept:
                rows_of.setdefault(row.trajectory.group, []).append(row)
        self.groups += rows_of.values()
        self.left_out += drawn.left_out
        self.batches += 1
        self.generated += len(signal) + len({row.trajectory.group for row in drawn.left_out})
        self.lengths += drawn.all_lengths
        self.rewards.append(drawn.rewards)
