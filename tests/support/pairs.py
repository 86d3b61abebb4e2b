"""Which pairs of settings a list of cases has: most faults need one setting or two to show.

Invariant: what `make test` leaves to `make test-all` adds no pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from rlhf3d.config.schema import LayoutConfig


def pairs_of_settings(cases: Iterable[dict[str, Any]]) -> set[tuple]:
    """Each pair of (name, value) that a case has."""
    pairs: set[tuple] = set()
    for settings in cases:
        pairs.update(combinations(sorted(settings.items()), 2))
    return pairs


def layout_settings(layout: LayoutConfig) -> dict[str, Any]:
    """Sizes as whether they are more than 1, and switches."""
    sizes = ("tp", "pp", "dp", "cp", "ep", "vpp")
    switches = ("sequence_parallel", "distributed_optimizer", "overlap_grad_reduce")
    switches += ("overlap_param_gather", "recompute")
    found = {name: (getattr(layout, name) or 1) > 1 for name in sizes}
    return found | {name: getattr(layout, name) for name in switches}
