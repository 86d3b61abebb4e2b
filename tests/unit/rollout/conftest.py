"""A process for vLLM, which changes torch and the environment of the one that loads it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def in_vllm_process() -> Iterator[Callable[..., Any]]:
    """Runs a function of the test's module with its arguments there.

    Loading vLLM is paid for once.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # read when Triton is loaded
            pool.submit(int).result(timeout=60)
        yield lambda function, *args: pool.submit(function, *args).result(timeout=800)
