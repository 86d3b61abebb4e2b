"""The staging area: training ranks write canonical weight slices, engines on the same host read whole tensors.

Invariant: `StagingArea.verify(version)` passes only if every planned slice was written for that policy version and
holds, bit for bit, what its sender had after the cast to the engine's dtype.

What proves it: a plan's slices tile each tensor exactly (checked when planned); the file's slice table holds one
row `(policy version, fingerprint)` a slice, written by the sender after the data, so a dropped or late slice shows
its old version; the fingerprint is computed from the sender's own tensor and recomputed from the file, so a flipped
byte, a torn write or another slice's data in its place shows. It does not prove that the sender's values were the
right ones, nor that the engine uses what it loaded: the canary (engine against trainer log-probs) does.

File layout: header (plan digest, padded to 64 bytes) | slice table, int64 [slices, 2] | tensors, 64-byte aligned.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from rlhf3d.models.weights import Box, full_box

Slice: TypeAlias = tuple[str, Box]
"""A tensor's name and the box of it that one sender writes."""

ALIGNMENT_BYTES = 64
FINGERPRINT_CHUNK = 8192
FILE_PREFIX = "rlhf3d-staging-"
NEVER_WRITTEN = -1


class StagingError(RuntimeError):
    """The area does not hold what the plan promises; the message names the tensor."""


@dataclass(frozen=True)
class StagedTensor:
    """Where one tensor lies: `offset` bytes from the start of the file, row-major."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StagingPlan:
    """The file's layout; the same in every process, picklable, printed by `str`."""

    tensors: dict[str, StagedTensor]
    slices: tuple[Slice, ...]
    total_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of tensor data: what one sync moves."""
        return sum(t.num_bytes for t in self.tensors.values())

    @property
    def digest(self) -> int:
        """63-bit identity of the layout, stored in the file."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:8], "little") >> 1

    def __str__(self) -> str:
        return f"{len(self.tensors)} tensors in {len(self.slices)} slices, {self.weight_bytes / 2**20:.1f} MiB"


def plan_staging(
    tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype, slices: Sequence[Slice] | None = None
) -> StagingPlan:
    """Lay out `tensors` (name -> shape) in `dtype`; `slices` are what the senders write (null: whole tensors).

    Raises ValueError, naming the tensor, unless the slices cover every element exactly once.
    """
    if slices is None:
        slices = [(name, full_box(shape)) for name, shape in tensors.items()]
    _check_tiling(tensors, slices)
    offset = _align(ALIGNMENT_BYTES + 16 * len(slices))
    staged = {}
    for name, shape in tensors.items():
        staged[name] = StagedTensor(tuple(shape), dtype, offset)
        offset = _align(offset + staged[name].num_bytes)
    return StagingPlan(staged, tuple(slices), offset)


def staging_path(plan: StagingPlan, name: str) -> Path:
    """A file for `plan` in /dev/shm where that exists and has room, else in the temporary folder.

    Files that killed runs left there (nobody has them open any more) are removed first.
    """
    shm = Path("/dev/shm")
    for folder in (shm, Path(tempfile.gettempdir())):
        if folder.is_dir():
            _remove_abandoned(folder)
    has_room = shm.is_dir() and os.statvfs(shm).f_bavail * os.statvfs(shm).f_frsize > plan.total_bytes
    return (shm if has_room else Path(tempfile.gettempdir())) / f"{FILE_PREFIX}{name}"


class StagingArea:
    """One process's mapping of the file. Tensors handed out are views: drop them before `close`."""

    def __init__(self, plan: StagingPlan, path: Path, fd: int) -> None:
        self.plan, self.path, self._fd = plan, path, fd
        self._slots = {piece: slot for slot, piece in enumerate(plan.slices)}
        self._mmap = mmap.mmap(fd, plan.total_bytes)
        # Through numpy, the mapping counts its views and refuses to close under them.
        self._bytes = torch.from_numpy(np.frombuffer(self._mmap, dtype=np.uint8))
        self._digest = self._bytes[:8].view(torch.int64)
        table_bytes = 16 * len(plan.slices)
        self._table = self._bytes[ALIGNMENT_BYTES : ALIGNMENT_BYTES + table_bytes].view(torch.int64).view(-1, 2)

    @classmethod
    def create(cls, plan: StagingPlan, path: str | Path) -> StagingArea:
        """Make the file (FileExistsError if it is there) with all its memory reserved, no slice written."""
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            os.posix_fallocate(fd, 0, plan.total_bytes)
            area = cls(plan, Path(path), fd)
        except OSError as error:
            os.close(fd)
            os.unlink(path)
            raise OSError(
                error.errno,
                f"{path} needs {plan.total_bytes / 2**20:.0f} MiB of shared memory ({error.strerror}): "
                "free or enlarge it (docker run --shm-size), or stage in another folder",
            ) from error
        area._digest.fill_(plan.digest)
        area._table.fill_(NEVER_WRITTEN)
        return area

    @classmethod
    def open(cls, plan: StagingPlan, path: str | Path) -> StagingArea:
        """Map an existing file. Raises StagingError when it was made for another plan."""
        fd = os.open(path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_size != plan.total_bytes:
            os.close(fd)
            raise StagingError(f"{path} was not made for this plan ({plan}): its size differs")
        area = cls(plan, Path(path), fd)
        if int(area._digest) != plan.digest:
            area.close()
            raise StagingError(f"{path} was not made for this plan ({plan}): its layout differs")
        return area

    def write(self, name: str, box: Box, tensor: torch.Tensor, policy_version: int) -> int:
        """Write one planned slice (any device; cast here to the engine's dtype) and return its fingerprint."""
        slot = self._slots.get((name, box))
        if slot is None:
            raise StagingError(f"{name} {box} is not a slice of the staging plan")
        target = self._view(name, box)
        if tensor.shape != target.shape:
            raise StagingError(f"{name} {box} has shape {tuple(target.shape)}, its sender wrote {tuple(tensor.shape)}")
        cast = tensor.detach().to(device="cpu", dtype=target.dtype).contiguous()
        target.copy_(cast)
        checksum = fingerprint(cast)
        self._table[slot] = torch.tensor([policy_version, checksum])
        return checksum

    def verify(self, policy_version: int) -> None:
        """Raise StagingError, naming the tensor, unless the invariant holds for `policy_version`."""
        for (name, box), (version, checksum) in zip(self.plan.slices, self._table.tolist(), strict=True):
            if version != policy_version:
                was = "was never written" if version == NEVER_WRITTEN else f"holds policy version {version}"
                raise StagingError(f"{name} {box} {was}; wanted policy version {policy_version}")
            if fingerprint(self._view(name, box)) != checksum:
                raise StagingError(f"{name} {box} differs from what its sender wrote for policy version {version}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor as a view of the file, in the plan's order."""
        for name, staged in self.plan.tensors.items():
            yield name, self._view(name, full_box(staged.shape))

    def close(self) -> None:
        """Unmap. Raises BufferError while a view is alive, which would otherwise become a dangling pointer."""
        if self._mmap.closed:
            return
        self._bytes = self._digest = self._table = torch.empty(0)
        self._mmap.close()
        os.close(self._fd)

    def unlink(self) -> None:
        """Remove the file; its memory is freed when the last process has closed it."""
        self.path.unlink(missing_ok=True)

    def _view(self, name: str, box: Box) -> torch.Tensor:
        staged = self.plan.tensors[name]
        flat = self._bytes[staged.offset : staged.offset + staged.num_bytes].view(staged.dtype)
        return flat.view(staged.shape)[tuple(slice(start, stop) for start, stop in box)]


def fingerprint(tensor: torch.Tensor) -> int:
    """64-bit checksum of the raw bits of a CPU tensor, read in row-major order.

    Wrapping sum of the 8-byte words (zero-padded), each times an odd pseudo-random weight of its position: any one
    changed word changes the sum, as multiplying by an odd number is a bijection modulo 2**64.
    """
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    padding = -raw.numel() % 8
    if padding or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(padding)])
    words = raw.view(torch.int64)
    whole = words.numel() // FINGERPRINT_CHUNK * FINGERPRINT_CHUNK
    weights = _odd_weights(0, FINGERPRINT_CHUNK)
    chunks, rest = words[:whole].view(-1, FINGERPRINT_CHUNK), words[whole:]
    partial = torch.cat([chunks.mv(weights), (rest * weights[: rest.numel()]).sum()[None]])
    return int((partial * _odd_weights(1, partial.numel())).sum()) ^ tensor.numel()


def _odd_weights(stream: int, count: int) -> torch.Tensor:
    """`count` odd int64 numbers: the mixer of SplitMix64 (Steele et al. 2014) over positions of `stream`."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64((stream << 40) + 1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64))


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _check_tiling(tensors: Mapping[str, tuple[int, ...]], slices: Sequence[Slice]) -> None:
    boxes: dict[str, list[Box]] = {name: [] for name in tensors}
    for name, box in slices:
        if name not in boxes:
            raise ValueError(f"slice {name} {box} belongs to no staged tensor")
        shape = tensors[name]
        inside = len(box) == len(shape) and all(0 <= a < b <= n for (a, b), n in zip(box, shape, strict=True))
        if not inside:
            raise ValueError(f"slice {box} is not inside {name} of shape {tuple(shape)}")
        for other in boxes[name]:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                raise ValueError(f"slices {other} and {box} of {name} overlap")
        boxes[name].append(box)
    for name, shape in tensors.items():
        covered = sum(math.prod(b - a for a, b in box) for box in boxes[name])
        if covered != math.prod(shape):
            raise ValueError(f"slices of {name} cover {covered} of its {math.prod(shape)} elements")


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{FILE_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            # Every process that has an area open holds the shared lock.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
