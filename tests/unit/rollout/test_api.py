"""Seeds are stable and distinct; settings that mean nothing are refused."""

from __future__ import annotations

import itertools

import pytest

from rlhf3d.rollout.api import (
    Completion,
    SamplingSettings,
    Versions,
    request_seed,
    token_versions,
    written_by,
)


def test_request_seed_never_changes() -> None:
    # Recorded once: another value would break "the same run gives the same samples".
    assert request_seed(0, 0, 0, 0) == 5854343820274218872
    assert request_seed(1, 2, 3, 4) == 1159737786199761749


def test_request_seeds_are_distinct_and_63_bit() -> None:
    seeds = [
        request_seed(*key) for key in itertools.product(range(2), range(12), range(12), range(12))
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": -1.0}, {"max_tokens": 0}]
)
def test_settings_without_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingSettings(**settings)  # type: ignore[arg-type]


def test_greedy_ignores_temperature() -> None:
    assert SamplingSettings(temperature=0.0, greedy=True).greedy


def test_each_token_of_a_completion_has_the_version_that_wrote_it() -> None:
    completion = Completion((5, 6, 7), (-1.0,) * 3, "stop", ((0, 2), (1, 4)))
    assert token_versions(completion.versions, 3).tolist() == [2, 4, 4]
    assert (completion.oldest_version, completion.newest_version) == (2, 4)
    assert Completion((), (), "stop", written_by(3)).newest_version == 3


@pytest.mark.parametrize(
    "versions",
    [(), ((1, 0),), ((0, 1), (0, 2)), ((0, 2), (1, 2)), ((0, 2), (1, 1)), ((0, 1), (2, 2))],
)
def test_versions_cover_two_tokens_and_ascend(versions: Versions) -> None:
    with pytest.raises(AssertionError):
        Completion((5, 6), (-1.0, -1.0), "stop", versions)
