"""Each token is compared with the version that wrote it, and with no other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from support.certificate import Agreement, span_certificate
from support.experience import prompt

from rlhf3d.experience.trajectory import Row, Span, Trajectory


def logprob(version: int, place: int) -> float:
    """What a version gives the token at a place of a response: no two are alike."""
    return -(version + place / 16)


def said(start: int, versions: tuple[tuple[int, int], ...], writers: Sequence[int]) -> Span:
    """A turn whose first token is the response's number `start`; `writers` of each token."""
    logprobs = [logprob(version, start + place) for place, version in enumerate(writers)]
    return Span("sampled", (7,) * len(writers), logprobs, versions)


OBSERVATION = Span("environment", (5, 5))
ROWS = [
    # Tokens 0 and 1 by version 3, 2 by 4, an observation, 5 by 4.
    Row((4,), (said(0, ((0, 3), (2, 4)), (3, 3, 4)), OBSERVATION, said(5, ((0, 4),), (4,)))),
    Row((4, 4), (said(0, ((0, 6),), (6, 6)),)),
    Row((4,), (said(0, ((0, 5),), ()),)),
]


def trajectories(*rows: Row) -> list[Trajectory]:
    """The first two rows are of one."""
    return [Trajectory(prompt(0), 0, rows[:2], "stop"), Trajectory(prompt(1), 1, rows[2:], "stop")]


def test_the_right_versions_agree() -> None:
    asked: dict[int, list[Row]] = {}

    def under(version: int, rows: Sequence[Row]) -> list[list[float]]:
        asked[version] = list(rows)
        # Of every token of the response: an observation's counts for nothing.
        return [[logprob(version, place) for place in range(row.response_length)] for row in rows]

    found = span_certificate(trajectories(*ROWS), under)
    assert found == {3: Agreement(2, 0, 0), 4: Agreement(2, 0, 0), 6: Agreement(2, 0, 0)}
    assert asked == {3: ROWS[:1], 4: ROWS[:1], 6: ROWS[1:2]}, "nobody else's rows are computed"


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        # One token too many for version 3, and one too few: 1 nat apart.
        (((0, 3), (1, 4)), {3: Agreement(1, 0, 0), 4: Agreement(3, 1 / 3, 1)}),
        (((0, 3),), {3: Agreement(3, 1 / 3, 1), 4: Agreement(1, 0, 0)}),
    ],
)
def test_a_boundary_that_is_off_by_one_shows(
    versions: tuple[tuple[int, int], ...], expected: dict[int, Agreement]
) -> None:
    first = ROWS[0].spans[0]
    wrong = Span("sampled", first.token_ids, first.logprobs, versions)
    row = Row((4,), (wrong, *ROWS[0].spans[1:]))

    def under(version: int, rows: Sequence[Row]) -> list[list[float]]:
        return [[logprob(version, place) for place in range(row.response_length)] for row in rows]

    assert span_certificate([Trajectory(prompt(0), 0, (row,), "stop")], under) == expected


def test_what_is_not_finite_is_no_agreement() -> None:
    def under(version: int, rows: Sequence[Row]) -> list[list[float]]:
        return [[math.nan] * row.response_length for row in rows]

    found = span_certificate(trajectories(*ROWS), under)
    assert all(one.largest == math.inf and one.mean == math.inf for one in found.values())
