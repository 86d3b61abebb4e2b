"""Which hidden state predicts which response token: padded, packed, and with prefixes once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from rlhf3d.batching.batch import from_sequences
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.derived import width_multiples
from rlhf3d.config.schema import LayoutConfig
from rlhf3d.engine.microbatch import make_microbatch, token_shape
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform

BATCH = from_sequences(
    [[1, 2, 3], [4], [5, 6]],
    [[7, 8], [9, 10, 11], []],
    pad_id=0,
    old=[[0.1, 0.2], [0.3, 0.4, 0.5], []],
)
CPU = partial(CPUPlatform("test").to_device, device=torch.device("cpu"))


def test_from_sequences_pads_right() -> None:
    assert BATCH["input_ids"].tolist() == [[1, 2, 3, 7, 8], [4, 9, 10, 11, 0], [5, 6, 0, 0, 0]]
    assert BATCH["response_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert BATCH.lengths() == [5, 4, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_state_before_each_response_token_predicts_it(packed: bool) -> None:
    micro = make_microbatch(BATCH, [1, 0], CPU, MicroBatching(1, packed=packed))
    assert micro.labels.tolist() == [9, 10, 11, 7, 8]
    # "Hidden state" = the token at that position: what stands just before each response token.
    states = micro.input_ids[..., None].float()
    assert micro.gather(states)[:, 0].tolist() == [4, 9, 10, 3, 7]
    assert micro.scatter(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 3], [4, 5, 0]]
    torch.testing.assert_close(micro.rows["old"], torch.tensor([[0.3, 0.4, 0.5], [0.1, 0.2, 0.0]]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp_rank", [0, 1])
def test_a_sampled_token_behind_an_observation_is_predicted_by_the_token_before_it(
    packed: bool, cp_rank: int
) -> None:
    """Two turns around two observed tokens: masked for the loss, read by the model."""
    turns = from_sequences([[1, 2]], [[7, 20, 21, 8, 9]], 0, response_mask=[[1, 0, 0, 1, 1]])
    rule = MicroBatching(1, packed=packed, multiple_of=4, row_multiple_of=4)
    micro = make_microbatch(turns, [0], CPU, rule, 2, cp_rank)
    before = micro.gather(micro.input_ids[..., None].float())[:, 0]
    # Chunks of two tokens, 1 2 | 7 20 | 21 8 | 9 -: rank 0 has the first and the last.
    expected = {0: ([7], [2.0]), 1: ([20, 21, 8, 9], [7.0, 20.0, 21.0, 8.0])}[cp_rank]
    assert (micro.labels.tolist(), before.tolist()) == expected
    assert micro.rows["response_mask"].tolist() == [[1, 0, 0, 1, 1]]
    logprobs = micro.scatter(-before)[0]
    assert logprobs.tolist() == ([-2, 0, 0, 0, 0] if cp_rank == 0 else [0, -7, -20, -21, -8])


def test_rows_are_trimmed_and_rounded_up() -> None:
    assert make_microbatch(BATCH, [2], CPU, MicroBatching(1)).input_ids.shape == (1, 2)
    assert make_microbatch(BATCH, [2], CPU, MicroBatching(1)).labels.numel() == 0
    micro = make_microbatch(BATCH, [0, 1], CPU, MicroBatching(1, multiple_of=4))
    assert micro.input_ids.shape == micro.position_ids.shape == (2, 8)
    assert micro.input_ids[0].tolist() == [1, 2, 3, 7, 8, 0, 0, 0]
    assert micro.segment_ends is None


def test_packed_rows_follow_each_other() -> None:
    micro = make_microbatch(BATCH, [2, 1], CPU, MicroBatching(1, packed=True))
    assert micro.input_ids.tolist() == [[5, 6, 4, 9, 10, 11]]
    assert micro.position_ids.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert micro.segment_ends is not None and micro.segment_ends.tolist() == [0, 2, 6]
    assert micro.segment_ends.dtype == torch.int32
    assert micro.longest_segment == 4


def test_padding_of_packed_rows_is_a_segment_of_its_own() -> None:
    micro = make_microbatch(BATCH, [2, 1], CPU, MicroBatching(1, packed=True, multiple_of=4))
    assert micro.input_ids.tolist() == [[5, 6, 4, 9, 10, 11, 0, 0]]
    assert micro.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    assert micro.segment_ends is not None and micro.segment_ends.tolist() == [0, 2, 6, 8]
    exact = make_microbatch(BATCH, [1], CPU, MicroBatching(1, packed=True, multiple_of=4))
    assert exact.segment_ends is not None and exact.segment_ends.tolist() == [0, 4]
    # The longest segment can be the padding: rotary tables are cut to it.
    assert (
        make_microbatch(
            BATCH, [2], CPU, MicroBatching(1, packed=True, multiple_of=8)
        ).longest_segment
        == 6
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "batch", [BATCH, BATCH.select([])], ids=["rows elsewhere", "no rows at all"]
)
def test_no_rows_make_a_filler(packed: bool, batch) -> None:
    micro = make_microbatch(batch, [], CPU, MicroBatching(1, packed=packed, multiple_of=2))
    assert micro.input_ids.shape == micro.position_ids.shape == (1, 2)
    assert micro.labels.numel() == micro.hidden_index.numel() == 0
    assert micro.rows["response_mask"].tolist() == [[0]] and micro.rows["old"].tolist() == [[0]]
    assert micro.scatter(torch.zeros(0)).tolist() == [[0]]


@pytest.mark.parametrize("rows", [[1, 0], [2], [0, 1, 2], []], ids=str)
def test_segments_are_whole_chunks_of_every_context_parallel_rank(rows: list[int]) -> None:
    """The padding's too: of a segment's tokens Transformer Engine gives each rank length // cp."""
    rule = MicroBatching(
        1, packed=True, **width_multiples(LayoutConfig(cp=2, tp=2, sequence_parallel=True), "cuda")
    )
    ends = make_microbatch(BATCH, rows, CPU, rule, 2, 0).segment_ends
    assert ends is not None and not (ends.diff() % 4).any() and (ends.diff() > 0).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("rows", [[1, 0], [2], [0, 1, 2], []], ids=str)
def test_a_micro_batch_has_the_shape_that_is_planned(
    rows: list[int], cp: int, packed: bool
) -> None:
    rule = MicroBatching(1, packed=packed, multiple_of=4, row_multiple_of=4)
    made = make_microbatch(BATCH, rows, CPU, rule, cp, cp - 1)
    assert token_shape(BATCH, rows, rule, cp) == tuple(made.input_ids.shape)


@pytest.mark.parametrize("packed", [False, True])
def test_context_parallel_ranks_share_out_rows_and_response_tokens(packed: bool) -> None:
    """Together they hold what one rank holds: each response token where the hidden state before it
    is.
    """
    rule = MicroBatching(1, packed=packed, multiple_of=4, row_multiple_of=4)
    whole = make_microbatch(BATCH, [1, 0], CPU, rule)
    parts = [make_microbatch(BATCH, [1, 0], CPU, rule, 2, rank) for rank in (0, 1)]
    columns = []
    for part in parts:
        assert part.input_ids.shape[1] * 2 == whole.input_ids.shape[1]
        assert (
            part.segment_ends is whole.segment_ends
            or part.segment_ends.tolist() == whole.segment_ends.tolist()
        )
        before = part.gather(part.input_ids[..., None].float())[:, 0]
        columns.append(part.scatter(before) + 100 * part.scatter(part.labels.float()))
    expected = whole.scatter(
        whole.gather(whole.input_ids[..., None].float())[:, 0] + 100 * whole.labels.float()
    )
    assert torch.equal(columns[0] + columns[1], expected)
    assert all(column.count_nonzero() > 0 for column in columns)


def test_packed_rows_divide_into_chunks_of_every_rank() -> None:
    rule = MicroBatching(1, packed=True, multiple_of=8, row_multiple_of=4)
    micro = make_microbatch(BATCH, [0, 1, 2], CPU, rule)
    assert micro.segment_ends is not None and micro.segment_ends.tolist() == [0, 8, 12, 16]
    assert micro.position_ids.tolist() == [[*range(8), *range(4), *range(4)]]
    assert rule.positions([5, 4, 2]) == 16 and rule.positions([5, 4, 4]) == 16


@pytest.mark.parametrize("packed", [False, True])
def test_all_columns_reach_a_gpu_from_pinned_memory_without_a_wait(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pageable memory, or blocking, each copy would drain the GPU's queue of kernels."""
    pinned: list[int] = []
    copied: list[int] = []
    to = torch.Tensor.to

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor

    def copy(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args == (torch.device("meta"),):
            assert pinned[-1] == id(tensor) and kwargs == {"non_blocking": True}
            copied.append(id(tensor))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    move = partial(CUDAPlatform("test").to_device, device=torch.device("meta"))
    micro = make_microbatch(BATCH, [1, 0], move, MicroBatching(1, packed=packed))
    tensors = [
        *micro.rows.columns.values(),
        *(v for v in vars(micro).values() if isinstance(v, torch.Tensor)),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and len(copied) == len(tensors)


GROUP = from_sequences(
    [[1, 2, 3], [1, 2, 3], [1, 2], [9], [1, 2, 3]],
    [[7, 8], [7, 6], [3, 7, 8, 5], [4], [7, 8]],
    pad_id=0,
)


@pytest.mark.parametrize("multiple", [1, 4])
def test_what_rows_begin_with_is_there_once_and_predicts_for_all_of_them(multiple: int) -> None:
    rule = MicroBatching(8, multiple_of=multiple, share_prefixes=True)
    rows = [0, 3, 1, 2, 4]
    micro = make_microbatch(GROUP, rows, CPU, rule)
    # 1 2 3 7, then 8 and behind it 5, or 6; and 9 4.
    line = [1, 2, 3, 7, 6, 8, 5, 9, 4]
    padding = [0] * (-len(line) % multiple)
    assert micro.input_ids.tolist() == [line + padding]
    assert micro.position_ids[0, : len(line)].tolist() == [0, 1, 2, 3, 4, 4, 5, 0, 1]
    spans = [(0, 4, 7), (4, 5, 5), (5, 6, 7), (6, 7, 7), (7, 9, 9), (9, 12, 12)]
    assert micro.tree == tuple(spans if padding else spans[:-1])
    assert micro.longest_segment == 6, "positions that the rotary embedding has to know"
    before = micro.gather(micro.input_ids[..., None].float())[:, 0]
    assert micro.labels.tolist() == [7, 8, 4, 7, 6, 3, 7, 8, 5, 7, 8]
    assert before.tolist() == [3, 7, 9, 3, 7, 2, 3, 7, 8, 3, 7]
    assert micro.scatter(micro.labels.float()).tolist() == [
        [7, 8, 0, 0],
        [4, 0, 0, 0],
        [7, 6, 0, 0],
        [3, 7, 8, 5],
        [7, 8, 0, 0],
    ]


def test_rows_that_share_nothing_are_padded_or_packed_as_ever() -> None:
    for packed in (False, True):
        plain = MicroBatching(8, packed=packed)
        shared = replace(plain, share_prefixes=True)
        for rows in ([], [0], [3, 0]):
            ours, theirs = (make_microbatch(GROUP, rows, CPU, rule) for rule in (shared, plain))
            assert ours.tree is None and ours.input_ids.equal(theirs.input_ids)
            assert ours.hidden_index.equal(theirs.hidden_index)
            assert token_shape(GROUP, rows, shared) == tuple(ours.input_ids.shape)
