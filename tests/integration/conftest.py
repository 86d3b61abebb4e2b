"""Imports that tests share, and the order in which two workers take the files."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def megatron() -> None:
    """Import Megatron, patched, and the engine once, for all ranks forked from this process."""
    from support.engines import import_engine

    import_engine()
