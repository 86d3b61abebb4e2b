"""Held-out accuracy of the policy while it trains, by the same functions as `rlhf3d evaluate`.

Invariant: the accuracy counts right answers alone, whatever else the reward is made of; where a
reward model alone scores, nothing is right or wrong and there is no accuracy. A prompt with a
trajectory whose environment failed is in no figure: it is counted as left out.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from math import sqrt
from statistics import fmean, stdev

from rlhf3d.config.schema import ValidationConfig
from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.accuracy import Answers, summarize, vote
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.requests import Requests, TrajectoryRequest, greedy_sampling
from rlhf3d.experience.scored import ScoredTrajectory
from rlhf3d.experience.source import complete_groups
from rlhf3d.observability.samples import Kind
from rlhf3d.rewards.reward_model import PART, only_model
from rlhf3d.rollout.api import SamplingSettings
from rlhf3d.trainer.step_log import StepLog
from rlhf3d.trainer.weight_sync import WeightSync


class Validation:
    """Answers the held-out prompts with the newest weights."""

    def __init__(
        self,
        config: ValidationConfig,
        prompts: Sequence[Prompt],
        max_tokens: int,
        seed: int,
        collector: Collector,
        weights: WeightSync,
        log: StepLog,
    ) -> None:
        """`prompts` may be empty; `max_tokens`: of an answer; `seed`: of the run."""
        self._config, self._prompts = config, prompts
        self._max_tokens, self._seed = max_tokens, seed
        self._collector, self._weights, self._log = collector, weights, log

    def run(self, step: int) -> dict[str, float]:
        """Metrics of greedy and sampled answers, as configured; empty without prompts."""
        if not self._prompts:
            return {}
        metrics = self._weights.sync_weights()
        with self._log.phase("validate"):
            metrics |= self._answers(step)
        # In flight, other requests may run meanwhile, but no newer weights may have come.
        assert self._weights.served_version == self._weights.trained_version
        metrics["val-aux/policy_version"] = float(self._weights.trained_version)
        # A save may follow, and needs the memory.
        self._weights.sleep_engines()
        self._log.console.validation(f"step {step}", metrics)
        return metrics

    def _answers(self, step: int) -> dict[str, float]:
        asked = self._requests(step)
        # One collection: with one a kind, engines would run empty between them.
        rows = iter(self._collector.collect([*chain.from_iterable(asked.values())]))
        metrics: dict[str, float] = {}
        for kind, requests in asked.items():
            metrics |= self._figures(step, kind, list(islice(rows, len(requests))))
        return metrics

    def _requests(self, step: int) -> dict[Kind, list[TrajectoryRequest]]:
        """What is asked for, by kind; greedy answers first."""
        config, sampling = self._config, greedy_sampling(self._max_tokens)
        wanted: dict[Kind, tuple[int, SamplingSettings]] = {}
        if config.greedy:
            wanted["greedy"] = 1, sampling
        if config.sampled_n:
            sampling = SamplingSettings(config.temperature, max_tokens=self._max_tokens)
            wanted["sampled"] = config.sampled_n, sampling
        asked = {}
        for kind, (n, sampling) in wanted.items():
            # Seeds of step 0 every time, so that two validations differ by the policy alone.
            requests = Requests(self._seed, step=0, name=f"{kind}{step}")
            asked[kind] = requests.draw(self._prompts, n, sampling)
        return asked

    def _figures(self, step: int, kind: Kind, rows: list[ScoredTrajectory]) -> dict[str, float]:
        """Of the answers of one kind, which are written to `samples/`."""
        self._log.samples(step, [row.sample() for row in rows], kind)
        (rows,), left_out = complete_groups(rows)
        metrics = validation_metrics(rows, kind)
        if rows[0].episode is not None:
            prompts = {row.trajectory.group for row in left_out}
            metrics[f"val-aux/env/{kind}/prompts_left_out"] = float(len(prompts))
        return metrics


def validation_metrics(rows: Sequence[ScoredTrajectory], kind: str) -> dict[str, float]:
    """Metrics by data source; all groups of a source have the same number n of answers.

    `val-core/SOURCE/acc/KIND` is the mean; its interval, pass@k, maj@k and std@n are
    `val-aux/SOURCE/acc/KIND/…`. Of a reward model `val-core/SOURCE/reward_model/KIND` is the mean
    score, `val-aux/SOURCE/reward_model/KIND/se` its standard error over prompts.
    """
    groups: dict[int, list[ScoredTrajectory]] = {}
    for row in rows:
        groups.setdefault(row.trajectory.group, []).append(row)
    metrics = _reward_model_metrics(groups.values(), kind)
    if only_model([row.score for row in rows]):
        return metrics
    by_source: dict[str, list[Answers]] = {}
    for group in groups.values():
        scores = [row.score for row in group]
        votes = [vote(score.answer, score.outcome) for score in scores]
        answers = Answers(tuple(score.accuracy for score in scores), tuple(votes))
        by_source.setdefault(_source(group), []).append(answers)
    for source, prompts in by_source.items():
        figures = summarize(prompts)
        n = len(prompts[0].scores)
        metrics[f"val-core/{source}/acc/{kind}"] = figures.pop(f"mean@{n}")
        metrics[f"val-aux/{source}/num_prompts"] = figures.pop("prompts")
        metrics |= {f"val-aux/{source}/acc/{kind}/{name}": value for name, value in figures.items()}
    return metrics


def _source(group: Sequence[ScoredTrajectory]) -> str:
    return group[0].trajectory.prompt.data_source


def _reward_model_metrics(
    groups: Iterable[Sequence[ScoredTrajectory]], kind: str
) -> dict[str, float]:
    means: dict[str, list[float]] = {}
    for group in groups:
        values = [row.score.extra[PART] for row in group if PART in row.score.extra]
        if values:
            # One mean a prompt: its answers are not independent samples for the standard error.
            means.setdefault(_source(group), []).append(fmean(values))
    metrics: dict[str, float] = {}
    for source, of_prompts in means.items():
        error = 0.0
        if len(of_prompts) > 1:
            error = stdev(of_prompts) / sqrt(len(of_prompts))
        metrics[f"val-core/{source}/{PART}/{kind}"] = fmean(of_prompts)
        metrics[f"val-aux/{source}/{PART}/{kind}/se"] = error
        metrics[f"val-aux/{source}/num_prompts"] = float(len(of_prompts))
    return metrics
