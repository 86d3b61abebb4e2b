"""What this machine has: cores, memory, shared memory, disk, GPUs.

Invariant: only reads; numbers are GiB unless named otherwise, limits of the container included.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from rlhf3d.units import GIB

_CGROUP_FILES = (  # (limit, used) of version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Machine:
    """One host as a run would find it now."""

    cores: int
    """CPU cores this process may use."""
    memory_gib: float
    memory_available_gib: float
    shared_memory_gib: float
    """Free space of the shared-memory file system; 0 where there is none."""
    disk_gib: float
    """Free space where the run writes."""
    gpus: tuple[tuple[str, float], ...]
    """(name, memory GiB) of each GPU torch sees."""
    compiler: str | None
    """Path of a C++ compiler."""


def cores() -> int:
    """Return how many CPU cores this process may use."""
    # os.cpu_count ignores taskset, cpusets and Slurm's binding.
    return len(os.sched_getaffinity(0))


def memory_gib() -> float:
    """Return the memory of this host, GiB, or of the container if that has less."""
    total: int = psutil.virtual_memory().total
    return min([total, *(limit for limit, _ in _container_limits())]) / GIB


def used_gib() -> float:
    """Return the memory, GiB, in use on this host: what new processes could not have."""
    memory = psutil.virtual_memory()
    return float(memory.total - memory.available) / GIB


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions among `names` that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_machine(output: str | Path = ".") -> Machine:
    """Look at this host; `output` is the folder, existing or not, whose disk is asked."""
    # psutil sees the host; a container's limit may be lower.
    available = psutil.virtual_memory().available
    for limit, used_file in _container_limits():
        available = min(available, limit - int(Path(used_file).read_text()))
    # disk_usage needs a folder that is there: its nearest parent is on that disk.
    folder = Path(output).absolute()
    while not folder.exists():
        folder = folder.parent
    return Machine(
        cores=cores(),
        memory_gib=memory_gib(),
        memory_available_gib=available / GIB,
        shared_memory_gib=shutil.disk_usage(_SHARED_MEMORY).free / GIB
        if _SHARED_MEMORY.is_dir()
        else 0.0,
        disk_gib=shutil.disk_usage(folder).free / GIB,
        gpus=_gpus(),
        compiler=next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None),
    )


def _container_limits() -> Iterator[tuple[int, str]]:
    """(bytes of memory, file with the bytes in use) of each limit of the container."""
    for limit_file, used_file in _CGROUP_FILES:
        if not Path(limit_file).is_file():
            continue
        limit = Path(limit_file).read_text().strip()
        if limit.isdigit():  # "max" is no limit
            yield int(limit), used_file


def _gpus() -> tuple[tuple[str, float], ...]:
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple((gpu.name, gpu.total_memory / GIB) for gpu in found)


def loaded_from(library: str) -> Path | None:
    """Folder of the shared library `library`* that this process has loaded.

    ValueError when there are two.
    """
    # The files that are mapped into this process: what the dynamic loader took in the end.
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = [Path(line.split()[-1]) for line in lines if "/" in line]
    folders = sorted({str(file.parent) for file in files if file.name.startswith(library)})
    if len(folders) > 1:
        raise ValueError(
            f"{library} was loaded from {' and from '.join(folders)}, which do not fit together: "
            "take the one that is not of this environment out of LD_LIBRARY_PATH, CUDNN_HOME and "
            "CUDNN_PATH, or remove it"
        )
    return Path(folders[0]) if folders else None
