"""The reward model as the loop sees it: conversations in, scores out, computed by a worker group.

Invariant: a score is the classifier's output at the last token of prompt and completion, as
transformers computes it.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf3d.batching.batch import from_sequences
from rlhf3d.config.schema import RewardModelConfig
from rlhf3d.models.spec import load_spec
from rlhf3d.paths import read_json
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.rewards.reward_model import ModelScore, model_inputs, require_finite
from rlhf3d.rewards.score import ScoreItem


class RewardModel:
    """Scores conversations on the ranks of its group."""

    def __init__(self, config: RewardModelConfig, group: TrainGroup, tokenizer: Any) -> None:
        assert config.path is not None
        self._group, self._tokenizer, self._overlong = group, tokenizer, config.overlong
        spec = load_spec(config.path)
        self._limit = spec.max_position if config.max_length is None else config.max_length
        self._vocab_size = spec.vocab_size
        self._pad_id: int | None = read_json(Path(config.path) / "config.json").get("pad_token_id")

    def scores(self, items: Sequence[ScoreItem]) -> list[ModelScore]:
        """Return one score per item.

        RewardError where one is not finite, or an input is too long and may not be cut.
        """
        inputs = model_inputs(
            items, self._tokenizer, self._limit, self._overlong, self._pad_id, self._vocab_size
        )
        # The engine gives the value before each response token: with a response of one token,
        # whatever it is, that is the value at the last token of the input.
        batch = from_sequences([one.ids for one in inputs], [(0,)] * len(inputs), pad_id=0)
        values = self._group.forward("reward_model", "reward", batch)["values"][:, 0].tolist()
        require_finite(items, values)
        return [ModelScore(value, one.cut) for value, one in zip(values, inputs, strict=True)]
