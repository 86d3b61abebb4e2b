"""How old what a step trains on is: the versions that wrote its tokens, and the one being trained.

Invariant: versions count updates of the actor; a token is fresh where the version being trained
wrote it. Names and meanings are verl's where it has the figure: `trajectory_staleness` is that of a
trajectory's newest version, `trajectory_staleness_worst` that of its oldest, which
`rollout.max_staleness` bounds. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from rlhf3d.experience.scored import Experience
from rlhf3d.experience.trajectory import Row, Trajectory
from rlhf3d.rollout.api import stretches

_PREFIX = "training/off_policy/"


def staleness_metrics(experience: Experience, version: int) -> dict[str, float]:
    """How old the trajectories of a step are that trains `version`."""
    trajectories = [scored.trajectory for scored in experience.trajectories]
    spans, ages = [], Counter[int]()
    for trajectory in trajectories:
        tokens_of = _tokens_of(trajectory)
        spans.append(len(tokens_of))
        for written_by, tokens in tokens_of.items():
            ages[version - written_by] += tokens
    # Of no token at all, as where every completion is empty, the mean is 0.
    tokens = max(1, ages.total())
    return {
        **_spread("trajectory_staleness", [version - one.newest_version for one in trajectories]),
        **_spread(
            "trajectory_staleness_worst", [version - one.oldest_version for one in trajectories]
        ),
        **_spread("trajectory_spans", spans),
        f"{_PREFIX}partial_ratio": sum(count > 1 for count in spans) / len(spans),
        f"{_PREFIX}token_staleness/mean": sum(age * n for age, n in ages.items()) / tokens,
    }


def fresh_tokens(experience: Experience, version: int) -> Tensor:
    """[N, R] whether `version` wrote the token: rows and tokens as `Experience.batch` has them."""
    rows: list[Row] = []
    for scored in experience.trajectories:
        rows += scored.trajectory.rows
    # A step of empty responses still has columns.
    width = max(1, *(row.response_length for row in rows))
    fresh = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for span in row.spans:
            if span.author == "sampled":
                for first, end, writer in stretches(span.versions, len(span.token_ids)):
                    fresh[number, start + first : start + end] = writer == version
            start += len(span.token_ids)
    return fresh


def _tokens_of(trajectory: Trajectory) -> Counter[int]:
    """How many tokens each version wrote; a turn without tokens counts as its version's."""
    tokens = Counter[int]()
    for span in trajectory.turns:
        for first, end, version in stretches(span.versions, len(span.token_ids)):
            tokens[version] += end - first
    return tokens


def _spread(name: str, values: Sequence[int]) -> dict[str, float]:
    return {
        f"{_PREFIX}{name}/mean": fmean(values),
        f"{_PREFIX}{name}/max": float(max(values)),
        f"{_PREFIX}{name}/min": float(min(values)),
    }
