"""The span certificate: each token's log-prob is that of the version said to have written it.

Invariant: each sampled token is compared once, with the log-prob under the version of its span,
given everything that stood before it, whoever wrote that; nothing is averaged over versions. Pure:
who computes log-probs under kept weights is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlhf3d.experience.trajectory import Row, Trajectory
from rlhf3d.rollout.api import token_versions

LogprobsUnder = Callable[[int, Sequence[Row]], Sequence[Sequence[float]]]
"""(version, rows) to log p(token | all before it) of every token of each row's response, at the
temperature that was sampled with."""


@dataclass(frozen=True)
class Agreement:
    """How the tokens that one version wrote compare with that version's own log-probs."""

    tokens: int
    mean: float
    """|Difference|, nats."""
    largest: float
    """Infinite where one of the two log-probs is no finite number."""


def span_certificate(
    trajectories: Iterable[Trajectory], logprobs_under: LogprobsUnder
) -> dict[int, Agreement]:
    """What each version that wrote a token of `trajectories` says of its tokens, by version."""
    rows: list[Row] = []
    for trajectory in trajectories:
        rows += trajectory.rows
    written_by = [_written_by(row) for row in rows]
    versions: set[int] = set()
    for places in written_by:
        versions.update(places.values())
    certificate = {}
    for version in sorted(versions):
        # Rows without a token of it are not computed.
        numbers = [i for i, places in enumerate(written_by) if version in places.values()]
        scores = logprobs_under(version, [rows[i] for i in numbers])
        differences: list[float] = []
        for i, under in zip(numbers, scores, strict=True):
            engine = rows[i].logprobs
            assert len(under) == len(engine), f"{len(under)} log-probs of {len(engine)} tokens"
            own = [place for place, writer in written_by[i].items() if writer == version]
            differences += [_difference(engine[place], under[place]) for place in own]
        mean = sum(differences) / len(differences)
        certificate[version] = Agreement(len(differences), mean, max(differences))
    return certificate


def _written_by(row: Row) -> dict[int, int]:
    """Place in the response of each sampled token to the version that wrote it."""
    versions: dict[int, int] = {}
    start = 0
    for span in row.spans:
        if span.author == "sampled":
            each = token_versions(span.versions, len(span.token_ids))
            versions |= dict(enumerate(each, start))
        start += len(span.token_ids)
    return versions


def _difference(engine: float, under: float) -> float:
    difference = abs(engine - under)
    return difference if math.isfinite(difference) else math.inf
