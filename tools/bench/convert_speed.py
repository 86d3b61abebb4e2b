"""Conversion against a plain copy of the same bytes: seconds, bytes a second, peak memory, and whether all came back.

    python tools/bench/convert_speed.py configs/models/Qwen2.5-7B-Instruct --scratch /tmp/convert

Writes a Hugging Face folder of that shape with random bfloat16 weights, then: copy (cp and fsync), HF -> Megatron,
copy, Megatron -> HF, each from a source that is not in the page cache, and compares every byte of the tensors. Needs
three times the model's bytes on the disk of --scratch, which it empties at the end (--keep leaves it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf3d.checkpoints.blocks import raw, row_blocks, safetensors_header
from rlhf3d.checkpoints.convert import open_hf
from rlhf3d.checkpoints.stored import files_of
from rlhf3d.models.hf_io import INDEX_NAME
from rlhf3d.models.spec import load_spec
from rlhf3d.models.weights import hf_tensors

SHARD_BYTES = 4 << 30


def make_model(config: Path, folder: Path) -> None:
    """A folder of that shape; weights are runs of one block of normal numbers, from places that differ."""
    spec = load_spec(config, with_weights=False)
    tensors = {name: (torch.bfloat16, shape) for name, shape in hf_tensors(spec, "lm").items()}
    files = files_of({name: 2 * prod(shape) for name, (_, shape) in tensors.items()}, SHARD_BYTES)
    folder.mkdir(parents=True)
    shutil.copyfile(config / "config.json", folder / "config.json")
    numbers = (torch.randn(1 << 25) * 0.02).bfloat16()
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for i, held in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(held, name)
        with open(folder / name, "wb") as file:
            file.write(safetensors_header({tensor: tensors[tensor] for tensor in held}))
            for tensor in held:
                for box in row_blocks(tensors[tensor][1], 2, 1 << 24):
                    count = prod(stop - start for start, stop in box)
                    start = int(torch.randint(len(numbers) - count, (), generator=generator))
                    file.write(raw(numbers[start : start + count]))
            os.fsync(file.fileno())
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def forget(folder: Path) -> int:
    """Have the kernel drop the folder's files from the page cache; their bytes."""
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
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    cpu_s = usage.ru_utime + usage.ru_stime
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
    source: Path, destination: Path, scratch: Path, gb: float, workers: int
) -> dict[str, float]:
    """A conversion beside a copy of its source."""
    copy_s, copy_cpu_s = copy(source, scratch / "copy")
    forget(source)
    command = (sys.executable, "-m", "rlhf3d.cli", "convert", str(source), str(destination))
    done = timed(*command, "--workers", str(workers), "--json")
    convert_s = json.loads(done.output)["seconds"]
    return {
        "copy_s": round(copy_s, 2),
        "convert_s": convert_s,
        "ratio_to_copy": round(copy_s / convert_s, 3),
        "convert_gb_s": round(gb / convert_s, 3),
        "copy_cpu_s": round(copy_cpu_s, 2),
        "command_s": round(done.seconds, 2),
        "command_cpu_s": round(done.cpu_s, 2),
        "command_peak_rss_mib": round(done.peak_mib),
    }


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    first, second = open_hf(one), open_hf(other)
    if first.keys() != second.keys():
        return False
    for name, tensor in first.items():
        for box in row_blocks(tensor.shape, tensor.dtype.itemsize):
            a, b = (
                torch.empty([stop - start for start, stop in box], dtype=tensor.dtype)
                for _ in range(2)
            )
            tensor.read_into(box, a)
            second[name].read_into(box, b)
            if raw(a) != raw(b):
                return False
    return True


def main() -> None:
    """Measure, print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with config.json")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    scratch: Path = options.scratch
    hf, megatron, back = scratch / "hf", scratch / "megatron", scratch / "back"
    try:
        make_model(options.model, hf)
        gb = forget(hf) / 1e9
        rows = {}
        for name, source, destination in (("to_megatron", hf, megatron), ("to_hf", megatron, back)):
            rows[name] = measure(source, destination, scratch, gb, options.workers)
        print(
            json.dumps({"model": options.model.name, "gb": gb, **rows, "bitwise": same(hf, back)})
        )
    finally:
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
