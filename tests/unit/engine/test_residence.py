"""Tensors that leave their device and come back: identity, views and bits."""

from __future__ import annotations

import pytest
import torch

from rlhf3d.engine import residence
from rlhf3d.engine.residence import EngineResidence, Residents


def test_what_comes_back_is_what_left() -> None:
    buffer = torch.randn(64)
    views = [buffer[:16].view(4, 4), buffer[16:]]
    alone = torch.randn(3, 5, dtype=torch.bfloat16)
    before = [t.clone() for t in (buffer, alone)]
    residents = Residents([*views, buffer, alone])
    for _ in range(3):
        residents.leave()
        assert [t.untyped_storage().nbytes() for t in (buffer, alone)] == [0, 0]
        residents.enter()
        assert torch.equal(buffer, before[0]) and torch.equal(alone, before[1])
        assert torch.equal(views[0].flatten(), before[0][:16])
        views[1].add_(1.0)  # a change while here is kept
        before[0][16:] += 1.0


def test_what_is_not_kept_comes_back_as_zeros() -> None:
    gradients = torch.ones(8)
    residents = Residents([gradients], keep=False)
    residents.leave()
    residents.enter()
    assert torch.equal(gradients, torch.zeros(8))


def test_a_storage_belongs_to_one_group() -> None:
    """In float32 Megatron's main weights are views of the model's."""
    weights = torch.randn(8)
    own, moments = Residents([weights]), torch.randn(8)
    others = Residents([weights[:4], moments], without=[own])
    assert others.same_as(Residents([moments])) and not others.same_as(own)
    others.leave()
    assert weights.untyped_storage().nbytes() == 32 and moments.untyped_storage().nbytes() == 0
    others.enter()


def test_coming_twice_is_an_error_of_ours() -> None:
    residents = Residents([torch.ones(2)])
    with pytest.raises(AssertionError, match="are here already"):
        residents.enter()
    residents.leave()
    with pytest.raises(AssertionError, match="have left already"):
        residents.leave()


@pytest.mark.parametrize("shared", [False, True])
def test_what_torch_keeps_goes_after_work_where_others_want_the_device(shared: bool) -> None:
    freed: list[int] = []
    residence = EngineResidence(
        [torch.nn.Linear(2, 2)], None, lambda: freed.append(1), enabled=False, shared=shared
    )
    assert len(freed) == shared  # what loading left
    with residence.at_work("weights"):
        assert len(freed) == shared
    with (
        pytest.raises(RuntimeError, match="ours"),
        residence.at_work("weights", "gradients", "optimizer"),
    ):
        raise RuntimeError("ours")
    assert len(freed) == 3 * shared


def test_pinned_memory_is_taken_in_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch rounds each piece up to one: what is idle is less than a mebibyte a storage."""
    empty, asked = torch.empty, list[int]()

    def pinned(size: int, pin_memory: bool, **kwargs: torch.dtype) -> torch.Tensor:
        assert pin_memory
        asked.append(size)
        return empty(size, **kwargs)

    monkeypatch.setattr(torch, "empty", pinned)
    for wanted in (0, 5, 1 << 20, (1 << 22) + 1, 3_000_001):
        asked.clear()
        parts = residence.host_memory(wanted, pinned=True)
        assert sum(part.numel() for part in parts) == wanted
        taken = sum(1 << (size - 1).bit_length() for size in asked)
        assert taken - wanted < residence.PART_BYTES


def test_a_storage_in_several_parts_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residence, "PART_BYTES", 16)
    tensor = torch.randn(301)
    before, residents = tensor.clone(), Residents([tensor])
    residents.leave()
    residents.enter()
    assert torch.equal(tensor, before)
