"""Ray that does not start on this machine: a message, and the mistakes of others untouched."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf3d.placement import ray_here


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (Exception("timed out."), RuntimeError, r"timed out\. The machine has \d+ CPUs"),
        (ValueError("no such folder"), ValueError, "^no such folder$"),
    ],
)
def test_a_machine_too_busy_for_ray_is_named(
    raised: Exception,
    expected: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**settings: Any) -> None:
        raise raised

    monkeypatch.setattr(ray_here.ray, "init", init)
    with pytest.raises(expected, match=message):
        ray_here._init(num_cpus=1)
