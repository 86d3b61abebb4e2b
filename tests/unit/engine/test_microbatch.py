"""Which hidden state predicts which response token."""

from __future__ import annotations

import torch

from rlhf3d.batching.batch import from_sequences
from rlhf3d.engine.microbatch import make_microbatch

BATCH = from_sequences(
    [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11], []], pad_id=0, old=[[0.1, 0.2], [0.3, 0.4, 0.5], []]
)


def test_from_sequences_pads_right() -> None:
    assert BATCH["input_ids"].tolist() == [[1, 2, 3, 7, 8], [4, 9, 10, 11, 0], [5, 6, 0, 0, 0]]
    assert BATCH["response_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert BATCH.lengths() == [5, 4, 2]


def test_hidden_state_before_each_response_token_predicts_it() -> None:
    micro = make_microbatch(BATCH, [1, 0], torch.device("cpu"))
    assert micro.labels.tolist() == [9, 10, 11, 7, 8]
    # "Hidden state" = the token at that position: what stands just before each response token.
    states = micro.input_ids[..., None].float()
    assert micro.gather(states)[:, 0].tolist() == [4, 9, 10, 3, 7]
    assert micro.scatter(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 3], [4, 5, 0]]
    torch.testing.assert_close(micro.rows["old"], torch.tensor([[0.3, 0.4, 0.5], [0.1, 0.2, 0.0]]))


def test_rows_are_trimmed_and_rounded_up() -> None:
    assert make_microbatch(BATCH, [2], torch.device("cpu")).input_ids.shape == (1, 2)
    assert make_microbatch(BATCH, [2], torch.device("cpu")).labels.numel() == 0
    micro = make_microbatch(BATCH, [0, 1], torch.device("cpu"), multiple_of=4)
    assert micro.input_ids.shape == micro.position_ids.shape == (2, 8)
    assert micro.input_ids[0].tolist() == [1, 2, 3, 7, 8, 0, 0, 0]
