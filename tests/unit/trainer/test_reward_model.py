"""The driver's side of a reward model: the value is that of the input's last token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.batching.batch import Batch
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.schema import RewardModelConfig
from rlhf3d.engine.microbatch import make_microbatch
from rlhf3d.rewards.reward_model import ModelScore
from rlhf3d.rewards.score import RewardError, ScoreItem
from rlhf3d.trainer.reward_model import RewardModel

ITEMS = [
    ScoreItem("s", text, None, messages=[{"role": "user", "content": "q"}])
    for text in ("a", "longer")
]


class LastToken:
    """Ranks whose value of a token is a hundredth of its id."""

    def forward(self, phase: str, role: str, batch: Batch) -> dict[str, torch.Tensor]:
        assert (phase, role) == ("reward_model", "reward")
        micro = make_microbatch(batch, range(len(batch)), torch.Tensor.contiguous, MicroBatching(1))
        return {"values": micro.scatter(micro.gather(micro.input_ids) / 100.0)}


def make(tmp_path: Path, group: Any, **changes: Any) -> RewardModel:
    """A model whose padding token is the newline that ends the template."""
    tokenizer = make_tiny_tokenizer()
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    shape = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 4,
        "num_attention_heads": 1,
        "vocab_size": 128,
        "intermediate_size": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 40,
        "pad_token_id": newline,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "model.safetensors").touch()
    return RewardModel(RewardModelConfig(path=str(tmp_path), **changes), group, tokenizer)


def test_the_score_is_that_of_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    end = make_tiny_tokenizer().eos_token_id
    assert (
        make(tmp_path, LastToken(), max_length=100).scores(ITEMS)
        == [ModelScore(pytest.approx(end / 100))] * 2
    )


def test_the_limit_is_the_window_unless_given(tmp_path: Path) -> None:
    with pytest.raises(
        RewardError, match=r"max_length = 40, of prompt 'q' of s with completion 'longer"
    ):
        make(tmp_path, LastToken()).scores(
            [ScoreItem("s", "longer" * 9, None, messages=ITEMS[0].messages)]
        )
    cut = make(tmp_path, LastToken(), max_length=8, overlong="truncate_left").scores(ITEMS)
    assert [score.cut for score in cut] == [True, True]


def test_a_score_that_is_no_number_stops(tmp_path: Path) -> None:
    class Broken(LastToken):
        def forward(self, phase: str, role: str, batch: Batch) -> dict[str, torch.Tensor]:
            return {"values": torch.tensor([[1.0], [float("nan")]])}

    with pytest.raises(RewardError, match=r"gave nan .* 'longer'"):
        make(tmp_path, Broken(), max_length=100).scores(ITEMS)
