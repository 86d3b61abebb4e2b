"""Seeds are stable and distinct; settings that mean nothing are refused."""

from __future__ import annotations

import itertools

import pytest

from rlhf3d.rollout.api import SamplingSettings, request_seed


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
