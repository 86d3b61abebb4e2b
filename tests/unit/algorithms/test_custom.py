"""A user's own file of algorithms."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.algorithms import custom
from rlhf3d.algorithms.advantages import ADVANTAGES
from rlhf3d.algorithms.losses import POLICY_LOSSES
from rlhf3d.algorithms.names import EstimatorNeeds

MINE = """
import torch
from rlhf3d.algorithms.advantages import AdvantageInputs, register_advantage
from rlhf3d.algorithms.losses import PolicyLossTerms, register_policy_loss

@register_advantage("half", needs_values=True)
def half(inputs):
    tokens = inputs.custom["scale"] * torch.ones_like(inputs.token_level_rewards)
    return tokens, tokens

@register_policy_loss("double")
def double(logprobs, old_logprobs, advantages, response_mask, settings):
    return PolicyLossTerms(-2 * advantages * logprobs)
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ADVANTAGES, "_entries", ADVANTAGES.entries())
    monkeypatch.setattr(POLICY_LOSSES, "_entries", POLICY_LOSSES.entries())
    monkeypatch.setattr(custom, "_LOADED", set())


def test_names_become_valid(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    assert "half" not in ADVANTAGES.names()
    custom.load_custom_algorithms(file)
    custom.load_custom_algorithms(file)  # executed once
    assert {"half", "gae"} <= set(ADVANTAGES.names()) and "double" in POLICY_LOSSES.names()
    assert ADVANTAGES["half"].needs == EstimatorNeeds(values=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "registers nothing"),
        (MINE.replace('"double"', '"vanilla"'), "'vanilla' is already registered"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        custom.load_custom_algorithms(file)
    assert f"{file}" in str(caught.value) and "algorithm.custom_path: " in str(caught.value)
    assert "half" not in ADVANTAGES.names()
