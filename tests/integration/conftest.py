"""Imports that tests share, and the order in which two workers take the files."""

from __future__ import annotations

import pytest

# Minutes first, seconds last: so the two workers end at about the same time.
LONGEST_FIRST = (
    "test_learning",
    "test_layout_invariance",
    "test_in_flight",
    "test_rehearsal",
    "test_ahead",
    "test_lookup",
    "test_environments",
    "test_planning",
    "test_rollout",
    "test_waiting",
    "test_convert",
    "test_evaluate",
    "test_transformer_engine",
    "test_two_nodes",
    "test_weight_writer",
    "test_rollout_group",
    "test_parity",
    "test_training",  # of tests/gpu
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def megatron() -> None:
    """Import Megatron, patched, and the engine once, for all ranks forked from this process."""
    from support.engines import import_engine

    import_engine()
