"""The tokens that engine and trainer are compared on."""

from __future__ import annotations

from rlhf3d.data.dataset import Prompt
from rlhf3d.trainer.canary import CANARY_PROMPTS, canary_tokens


def test_prompts_of_one_token_still_have_something_to_compare() -> None:
    prompts = [Prompt(ids, "t", "", {}, 0, "q") for ids in ((7,), (1, 2, 3), *[(4, 5)] * 9)]
    assert canary_tokens(prompts) == [(7, 7), (1, 2, 3), (4, 5), (4, 5)] and CANARY_PROMPTS == 4
