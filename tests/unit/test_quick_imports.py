"""Imports without the garbage collector: what it leaves out, and that it is on again."""

from __future__ import annotations

import gc

import pytest

from rlhf3d.imports import quick_imports


def test_the_collector_is_off_inside_and_leaves_out_what_was_made() -> None:
    gc.unfreeze()
    try:
        with quick_imports():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
        assert gc.isenabled() and gc.get_freeze_count() > len(made)
        assert not any(one is made for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_an_import_that_fails_leaves_the_collector_as_it_was() -> None:
    gc.disable()
    try:
        with pytest.raises(ImportError), quick_imports():
            raise ImportError("broken")
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
