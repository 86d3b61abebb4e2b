"""Tensors that leave their device and come back: identity, views and bits."""

from __future__ import annotations

import pytest
import torch

from rlhf3d.engine import offload
from rlhf3d.engine.offload import ModelStates, Storages


def test_what_comes_back_is_what_left() -> None:
    buffer = torch.randn(64)
    views = [buffer[:16].view(4, 4), buffer[16:]]
    alone = torch.randn(3, 5, dtype=torch.bfloat16)
    before = [t.clone() for t in (buffer, alone)]
    storages = Storages([*views, buffer, alone])
    for _ in range(3):
        storages.offload()
        assert [t.untyped_storage().nbytes() for t in (buffer, alone)] == [0, 0]
        storages.restore()
        assert torch.equal(buffer, before[0]) and torch.equal(alone, before[1])
        assert torch.equal(views[0].flatten(), before[0][:16])
        views[1].add_(1.0)  # a change while here is kept
        before[0][16:] += 1.0


def test_what_is_not_kept_comes_back_as_zeros() -> None:
    gradients = torch.ones(8)
    storages = Storages([gradients], keep=False)
    storages.offload()
    storages.restore()
    assert torch.equal(gradients, torch.zeros(8))


def test_a_storage_belongs_to_one_group() -> None:
    """In float32 Megatron's main weights are views of the model's."""
    weights = torch.randn(8)
    own, moments = Storages([weights]), torch.randn(8)
    others = Storages([weights[:4], moments], without=[own])
    assert others.same_as(Storages([moments])) and not others.same_as(own)
    others.offload()
    assert weights.untyped_storage().nbytes() == 32 and moments.untyped_storage().nbytes() == 0
    others.restore()


def test_coming_twice_is_an_error_of_ours() -> None:
    storages = Storages([torch.ones(2)])
    with pytest.raises(AssertionError, match="are on the device already"):
        storages.restore()
    storages.offload()
    with pytest.raises(AssertionError, match="are offloaded already"):
        storages.offload()


@pytest.mark.parametrize("shared", [False, True])
def test_what_torch_keeps_goes_after_work_where_others_want_the_device(shared: bool) -> None:
    freed: list[int] = []
    states = ModelStates(
        [torch.nn.Linear(2, 2)], None, lambda: freed.append(1), offload=False, shared=shared
    )
    assert len(freed) == shared  # what loading left
    with states.on_device("weights"):
        assert len(freed) == shared
    with (
        pytest.raises(RuntimeError, match="ours"),
        states.on_device("weights", "gradients", "optimizer"),
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
        parts = offload.host_memory(wanted, pinned=True)
        assert sum(part.numel() for part in parts) == wanted
        taken = sum(1 << (size - 1).bit_length() for size in asked)
        assert taken - wanted < offload.PART_BYTES


def test_a_storage_in_several_parts_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PART_BYTES", 16)
    tensor = torch.randn(301)
    before, storages = tensor.clone(), Storages([tensor])
    storages.offload()
    storages.restore()
    assert torch.equal(tensor, before)
