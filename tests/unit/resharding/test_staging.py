"""The staging area: layouts are exact, every fault is refused with the tensor's name, nothing stays behind."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf3d.resharding.staging import (
    ALIGNMENT_BYTES,
    FINGERPRINT_CHUNK,
    Slice,
    StagingArea,
    StagingError,
    StagingPlan,
    fingerprint,
    full_box,
    plan_staging,
    staging_path,
)

SHAPES = {"embed": (6, 5), "norm": (7,), "down": (4, 6)}
SLICES: list[Slice] = [
    ("embed", ((0, 3), (0, 5))),
    ("embed", ((3, 6), (0, 5))),
    ("norm", ((0, 7),)),
    ("down", ((0, 4), (0, 2))),
    ("down", ((0, 4), (2, 6))),
]


def make_plan(dtype: torch.dtype = torch.bfloat16) -> StagingPlan:
    return plan_staging(SHAPES, dtype, SLICES)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_all(area: StagingArea, values: dict[str, torch.Tensor], version: int, skip: Slice | None = None) -> None:
    for name, box in area.plan.slices:
        if (name, box) != skip:
            area.write(name, box, values[name][tuple(slice(*b) for b in box)], version)


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_plan_is_aligned_disjoint_and_picklable() -> None:
    plan = make_plan()
    assert [t.offset % ALIGNMENT_BYTES for t in plan.tensors.values()] == [0, 0, 0]
    # header 64, table 5 x 16 -> 128, then 60, 14 and 48 bytes of bfloat16, each padded to 64
    assert [t.offset for t in plan.tensors.values()] == [192, 256, 320]
    assert plan.total_bytes == 384
    assert plan.weight_bytes == 2 * (30 + 7 + 24)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert pickle.loads(pickle.dumps(plan)).digest == plan.digest != make_plan(torch.float32).digest
    assert str(plan) == "3 tensors in 5 slices, 0.0 MiB"


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (SLICES[1:], "slices of embed cover 15 of its 30"),
        ([*SLICES, ("norm", ((6, 7),))], "of norm overlap"),
        ([*SLICES[:2], ("norm", ((0, 8),))], "not inside norm"),
        ([*SLICES, ("head", ((0, 1),))], "head .* belongs to no staged tensor"),
    ],
)
def test_slices_must_tile(slices: list[Slice], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_staging(SHAPES, torch.float32, slices)


def test_round_trip_casts_and_leaves_nothing_behind(tmp_path: Path) -> None:
    plan, path, values = make_plan(), tmp_path / "area", weights(0)
    sender = StagingArea.create(plan, path)
    receiver = StagingArea.open(plan, path)
    write_all(sender, values, 3)
    receiver.verify(3)
    for name, tensor in receiver.tensors():
        assert torch.equal(tensor, values[name].bfloat16())
    del tensor
    receiver.close()
    sender.close()
    sender.close()
    sender.unlink()
    assert list(tmp_path.iterdir()) == []


def test_versions_follow_one_another(tmp_path: Path) -> None:
    area = StagingArea.create(make_plan(), tmp_path / "area")
    with pytest.raises(StagingError, match=r"embed .* was never written; wanted policy version 0"):
        area.verify(0)
    write_all(area, weights(0), 0)
    area.verify(0)
    with pytest.raises(StagingError, match=r"embed .* holds policy version 0; wanted policy version 1"):
        area.verify(1)
    write_all(area, weights(1), 1)
    area.verify(1)
    area.close()


@pytest.mark.parametrize("dropped", SLICES)
def test_dropped_slice_is_named(tmp_path: Path, dropped: Slice) -> None:
    area = StagingArea.create(make_plan(), tmp_path / "area")
    write_all(area, weights(0), 0)
    write_all(area, weights(1), 1, skip=dropped)
    with pytest.raises(StagingError, match=rf"{dropped[0]} .* holds policy version 0"):
        area.verify(1)
    area.close()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("byte", [0, 13])
def test_flipped_byte_is_named(tmp_path: Path, name: str, byte: int) -> None:
    plan = make_plan()
    area = StagingArea.create(plan, tmp_path / "area")
    write_all(area, weights(0), 5)
    area.verify(5)
    flip_byte(area.path, plan.tensors[name].offset + byte)
    with pytest.raises(StagingError, match=f"{name} .* differs from what its sender wrote"):
        area.verify(5)
    area.close()


def test_swapped_data_is_named(tmp_path: Path) -> None:
    area = StagingArea.create(make_plan(), tmp_path / "area")
    write_all(area, weights(0), 0)
    embed = dict(area.tensors())["embed"]
    embed.copy_(embed.roll(3, dims=0))
    del embed
    with pytest.raises(StagingError, match=r"embed .* differs"):
        area.verify(0)
    area.close()


def test_wrong_writes_are_refused(tmp_path: Path) -> None:
    area = StagingArea.create(make_plan(), tmp_path / "area")
    with pytest.raises(StagingError, match=r"norm .* is not a slice"):
        area.write("norm", ((0, 3),), torch.zeros(3), 0)
    with pytest.raises(StagingError, match=r"norm .* has shape \(7,\), its sender wrote \(1,\)"):
        area.write("norm", ((0, 7),), torch.zeros(1), 0)
    area.close()


def test_other_plan_is_refused(tmp_path: Path) -> None:
    StagingArea.create(make_plan(), tmp_path / "area").close()
    with pytest.raises(StagingError, match="its size differs"):
        StagingArea.open(make_plan(torch.float32), tmp_path / "area")
    same_size = plan_staging(dict(reversed(SHAPES.items())), torch.bfloat16, SLICES)
    with pytest.raises(StagingError, match="its layout differs"):
        StagingArea.open(same_size, tmp_path / "area")
    with pytest.raises(FileExistsError):
        StagingArea.create(make_plan(), tmp_path / "area")


def test_a_failed_create_says_how_to_mend_it_and_removes_the_file(tmp_path: Path) -> None:
    huge = plan_staging({"embed": (1 << 50,)}, torch.float32)
    with pytest.raises(OSError, match="shm-size"):
        StagingArea.create(huge, tmp_path / "area")
    assert list(tmp_path.iterdir()) == []


def test_close_refuses_under_a_live_view(tmp_path: Path) -> None:
    area = StagingArea.create(make_plan(), tmp_path / "area")
    view = dict(area.tensors())["norm"]
    with pytest.raises(BufferError):
        area.close()
    assert view.isfinite().all()
    del view
    area.close()


def write_in_child(plan: StagingPlan, path: Path, slices: list[Slice]) -> None:
    area = StagingArea.open(plan, path)
    values = weights(4)
    for name, box in slices:
        area.write(name, box, values[name][tuple(slice(*b) for b in box)], 7)
    area.close()


def test_two_processes_write_one_area(tmp_path: Path) -> None:
    plan = make_plan(torch.float32)
    area = StagingArea.create(plan, tmp_path / "area")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=write_in_child, args=(plan, area.path, SLICES[i::2])) for i in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    area.verify(7)
    assert all(torch.equal(tensor, weights(4)[name]) for name, tensor in area.tensors())
    area.close()


def test_staging_path_removes_only_abandoned_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = make_plan()
    abandoned = tmp_path / "rlhf3d-staging-killed"
    StagingArea.create(plan, abandoned).close()
    live = StagingArea.create(plan, tmp_path / "rlhf3d-staging-live")
    path = staging_path(plan, "mine")
    assert path.name == "rlhf3d-staging-mine" and not path.exists()
    assert not abandoned.exists() and live.path.exists()
    live.close()


def test_fingerprint_by_hand() -> None:
    # one word w = 3 at position 0: 3 x weight(0) x chunk weight(0), modulo 2**64, xor the element count
    one = fingerprint(torch.tensor([1], dtype=torch.int64)) ^ 1
    three = fingerprint(torch.tensor([3], dtype=torch.int64)) ^ 1
    assert one % 2 == 1
    assert (3 * one - three) % 2**64 == 0


@given(st.integers(0, 3 * FINGERPRINT_CHUNK), st.integers(1, 9), st.data())
def test_fingerprint_sees_any_byte_in_any_dtype(start: int, odd: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    generator = torch.Generator().manual_seed(start)
    tensor = torch.randn(3 * FINGERPRINT_CHUNK + odd, generator=generator).to(dtype)
    before = fingerprint(tensor)
    # the same bits at another address and stride give the same number
    shifted = torch.cat([tensor[:1], tensor])[1:]
    assert fingerprint(shifted) == before == fingerprint(torch.stack([tensor, tensor], 1)[:, 0])
    raw = tensor.view(torch.uint8)
    at = data.draw(st.integers(0, raw.numel() - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint(tensor) != before


def test_fingerprint_sees_moved_values_and_length() -> None:
    tensor = torch.randn(4 * FINGERPRINT_CHUNK, generator=torch.Generator().manual_seed(0))
    assert fingerprint(tensor.roll(2)) != fingerprint(tensor)
    assert fingerprint(tensor.roll(2 * FINGERPRINT_CHUNK)) != fingerprint(tensor)
    assert fingerprint(torch.zeros(3)) != fingerprint(torch.zeros(4))


def test_full_box() -> None:
    assert full_box((2, 3)) == ((0, 2), (0, 3))
