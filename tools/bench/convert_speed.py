"""Conversion against a plain copy of the same bytes: seconds, bytes a second, peak memory, and
whether all came back.

    python tools/bench/convert_speed.py configs/models/Qwen2.5-7B-Instruct --scratch /tmp/convert

Writes a Hugging Face folder of that shape with random bfloat16 weights, then in turns: copy (cp and
fsync) and HF -> Megatron, copy and Megatron -> HF, each from a source outside the page cache. It
prints medians and the ratios of all turns, and compares every byte of the tensors. Needs three
times the model's bytes on the disk of --scratch, which it empties at the end (--keep leaves it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf3d.models.hf_io import HFReader, write_model
from rlhf3d.models.spec import load_spec
from rlhf3d.models.weights import hf_tensors


def make_model(config: Path, folder: Path) -> None:
    """A folder of that shape; tensors are parts of one block of normal numbers, from any place."""
    spec = load_spec(config, with_weights=False)
    shapes = hf_tensors(spec, "lm")
    numbers = (torch.randn(max(map(prod, shapes.values())) + (1 << 20)) * 0.02).bfloat16()
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            start = int(torch.randint(1 << 20, (), generator=generator))
            yield name, numbers[start : start + prod(shape)].view(shape).clone()

    bare = folder.with_name("config")  # without the weights that the model's folder may hold
    bare.mkdir(parents=True)
    shutil.copyfile(config / "config.json", bare / "config.json")
    forms = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    folder.mkdir()
    write_model(folder, forms, tensors(), bare)


def forget(folder: Path) -> int:
    """Have the kernel drop the folder's files from the page cache; their bytes."""
    # Only pages that are on the disk can be dropped.
    total = 0
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(file.fileno()).st_size
    return total


class Timed(NamedTuple):
    """A command that ended well."""

    seconds: float
    cpu_s: float
    peak_mib: float
    output: bytes


def timed(*command: str) -> Timed:
    """Run a command in a process of its own."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # wait4 has the resources of this child alone; with a code set, Popen waits no more.
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    cpu_s = usage.ru_utime + usage.ru_stime
    # ru_maxrss is in KiB.
    return Timed(time.monotonic() - began, cpu_s, usage.ru_maxrss / 1024, output)


def copy(source: Path, destination: Path) -> tuple[float, float]:
    """Seconds of cp -r and fsync, and the processor's."""
    forget(source)
    copied = timed("cp", "-r", str(source), str(destination))
    began, cpu_began = time.monotonic(), time.process_time()
    for path in (path for path in destination.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    shutil.rmtree(destination)
    return copied.seconds + seconds, copied.cpu_s + cpu_s


def measure(
    source: Path, destination: Path, scratch: Path, gb: float, turns: int
) -> dict[str, float | list[float]]:
    """A conversion beside a copy of its source: medians of `turns`; the last one's result stays."""
    rows = []
    for _ in range(turns):
        shutil.rmtree(destination, ignore_errors=True)
        rows.append(_turn(source, destination, scratch, gb))
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return middle | {"turns": [row["times_the_copy"] for row in rows]}


def _turn(source: Path, destination: Path, scratch: Path, gb: float) -> dict[str, float]:
    copy_s, copy_cpu_s = copy(source, scratch / "copy")
    forget(source)
    command = (sys.executable, "-m", "rlhf3d.cli", "convert", str(source), str(destination))
    done = timed(*command, "--json")
    convert_s = json.loads(done.output)["seconds"]
    return {
        "copy_s": round(copy_s, 2),
        "convert_s": convert_s,
        "times_the_copy": round(convert_s / copy_s, 2),
        "convert_gb_s": round(gb / convert_s, 3),
        "copy_cpu_s": round(copy_cpu_s, 2),
        "command_s": round(done.seconds, 2),
        "command_cpu_s": round(done.cpu_s, 2),
        "command_peak_rss_mib": round(done.peak_mib),
    }


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    with HFReader(one) as first, HFReader(other) as second:
        if set(first.names()) != set(second.names()):
            return False
        for name in first.names():
            # As bytes: NaN is not equal to itself.
            a, b = (reader.read(name).contiguous().view(torch.uint8) for reader in (first, second))
            if not torch.equal(a, b):
                return False
    return True


def main() -> None:
    """Measure, print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with config.json")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    scratch: Path = options.scratch
    hf, megatron, back = scratch / "hf", scratch / "megatron", scratch / "back"
    try:
        make_model(options.model, hf)
        gb = forget(hf) / 1e9
        rows = {}
        for name, source, destination in (("to_megatron", hf, megatron), ("to_hf", megatron, back)):
            rows[name] = measure(source, destination, scratch, gb, options.turns)
        print(
            json.dumps({"model": options.model.name, "gb": gb, **rows, "bitwise": same(hf, back)})
        )
    finally:
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
