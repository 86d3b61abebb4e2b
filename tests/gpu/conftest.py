"""Skips what the machine has no GPU for, and keeps what was measured for `rlhf3d plan`.

    pytest -m gpu tests/gpu              one GPU: all that can go wrong there, in about 15 minutes
    pytest -m gpu2 tests/gpu             two GPUs: what needs a second one
    pytest tests/gpu --on-cpu            the suite itself, on CPU processes in the place of GPUs

Numbers measured on a GPU go to `runs/gpu_measured.json`, which `rlhf3d plan` takes instead of what
it assumes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from support.gpu_target import Target, cpu_target, find_gpus, gpu_target

from rlhf3d.planning.measured import DEFAULT, write_measured

NO_GPU = (
    "no GPU: nvidia-smi finds {found} of {needed}"
    " (pytest tests/gpu --on-cpu tries the suite without one)"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on-cpu", action="store_true", help="run the GPU suite on CPU processes, to try it"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    found = len(find_gpus())
    for item in here:
        needed = 2 if item.get_closest_marker("gpu2") else 1
        if found < needed and not config.getoption("--on-cpu", default=False):
            item.add_marker(pytest.mark.skip(reason=NO_GPU.format(found=found, needed=needed)))


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    """The devices of this session."""
    return (
        cpu_target()
        if request.config.getoption("--on-cpu", default=False)
        else gpu_target(find_gpus())
    )


@pytest.fixture(scope="session")
def measured(target: Target, request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """Numbers by the names of `rlhf3d.planning.measured`.

    Those of a GPU are kept, unless a test failed.
    """
    numbers: dict[str, float] = {}
    yield numbers
    if target.is_gpu and numbers and not request.session.testsfailed:
        commit = subprocess.run(
            ["git", "describe", "--always"], capture_output=True, text=True, check=False
        )
        source = (
            f"pytest -m gpu at {commit.stdout.strip() or 'an installed version'}, {date.today()}"
        )
        write_measured(DEFAULT, find_gpus()[0], source, numbers)
        print(f"measured numbers: {DEFAULT}")
