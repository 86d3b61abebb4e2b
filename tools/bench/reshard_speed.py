"""Weight sync into a live vLLM engine, compared with a gather of every tensor and a plain copy.

    python tools/bench/reshard_speed.py [--model FOLDER] [--tp 3] [--pp 2] [--repeats 7]

Six processes hold the model's weights as TP3×PP2 Megatron ranks would (cut by the weight table; no
Megatron needed), one more runs vLLM. Each repeat measures, one after the other:

* memcpy: as many bytes copied once by one process
* transfer: the stream into shared memory and out of it again, without fingerprints and without an
  engine
* verified: the same with fingerprints on both sides
* ours: a complete sync into vLLM, split into its parts
* gather: what frameworks commonly do: every rank all-gathers every tensor over its tensor-parallel
  group and gets it from the other stages by broadcast; rank 0 hands Hugging Face tensors to the
  engine, which runs `load_weights`

Figures that compare come from one run; the medians of all repeats are printed, with ratios.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from child import Child

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.models.boxes import Box, box_slices
from rlhf3d.models.hf_io import HFReader
from rlhf3d.models.spec import load_spec
from rlhf3d.models.weights import LocalParam, hf_tensors, local_params
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.resharding import receiving, sending
from rlhf3d.resharding.receiving import RingInbox, WeightReceiver
from rlhf3d.resharding.sending import WeightSender
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.resharding.sites import Sites
from rlhf3d.rollout.settings import EngineSettings

HERE = Path(__file__).resolve().parent
GATHERED = Path("/dev/shm/rlhf3d-bench-gathered")


class Trainer:
    """One training rank's weights, and both ways of handing them over."""

    def __init__(self, argument: tuple[SyncSetup, str, int, str]) -> None:
        self.setup, folder, self.rank, meeting = argument
        self.spec, self.layout = self.setup.spec, self.setup.layout
        self.dtype: torch.dtype = getattr(torch, self.setup.dtype)
        self.at = self.layout.coords(self.rank)
        self.table = local_params(self.spec, self.layout, self.at)
        with HFReader(folder) as reader:
            self.params = {(0, param.name): self._read(reader, param) for param in self.table}
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=self.rank, world_size=self.world
        )
        # Ranks are counted tensor-parallel first: a row is a stage, a column a pipeline.
        ranks = torch.arange(self.world).view(self.layout.pp, self.layout.tp)
        self.tp_groups = [dist.new_group(row.tolist()) for row in ranks]
        self.pp_groups = [dist.new_group(column.tolist()) for column in ranks.T]
        self.sender = WeightSender(self.setup, self.rank, self.params)

    @property
    def world(self) -> int:
        return self.layout.world_size

    def _read(self, reader: HFReader, param: LocalParam) -> torch.Tensor:
        weight = torch.empty(param.shape, dtype=self.dtype)
        for piece in param.pieces:
            weight[box_slices(piece.local_box)] = reader.read(piece.hf_name, piece.hf_box).to(
                self.dtype
            )
        return weight

    def open(self) -> None:
        self.sender.open()

    def send(self, sync: int, fingerprints: bool) -> float:
        """One sync's sends."""
        # Replaced where `send` looks it up; in this process alone.
        if not fingerprints:
            sending.fingerprint = no_fingerprint
        try:
            return self.sender.send(sync, sync).send_s
        finally:
            sending.fingerprint = receiving_fingerprint

    def gather(self) -> float:
        """Every rank ends up with every tensor whole; rank 0 lays them out for the engine.
        Seconds.
        """
        start = time.perf_counter()
        area = gathered_area(self.setup) if self.rank == 0 else {}
        for stage in range(self.layout.pp):
            tables = [
                local_params(self.spec, self.layout, self.layout.coords(r))
                for r in self._ranks(stage)
            ]
            for number, param in enumerate(tables[0]):
                shards = self._whole(stage, param, tables[0][number])
                if self.rank == 0:
                    for table, shard in zip(tables, shards, strict=True):
                        for piece in table[number].pieces:
                            area[piece.hf_name][box_slices(piece.hf_box)] = shard[
                                box_slices(piece.local_box)
                            ]
        return time.perf_counter() - start

    def _ranks(self, stage: int) -> list[int]:
        return [self.layout.rank(tp, stage, 0) for tp in range(self.layout.tp)]

    def _whole(self, stage: int, param: LocalParam, like: LocalParam) -> list[torch.Tensor]:
        """All tensor-parallel shards of a stage's parameter, on every rank."""
        tp = self.layout.tp if param.tp_dim is not None else 1
        shards = [torch.empty(like.shape, dtype=self.dtype) for _ in range(tp)]
        if self.at.pp == stage:
            own = self.params[0, param.name]
            if tp == 1:
                shards[0].copy_(own)
            else:
                dist.all_gather(shards, own, group=self.tp_groups[stage])
        # The stage that has them sends to the same tensor rank of all others.
        for shard in shards:
            dist.broadcast(
                shard, self.layout.rank(self.at.tp, stage, 0), group=self.pp_groups[self.at.tp]
            )
        # A parameter that is not cut stands for every rank's.
        return shards * (self.layout.tp // tp)


# The one function of both modules, to put back.
receiving_fingerprint = sending.fingerprint


def no_fingerprint(block: torch.Tensor, box: Box) -> int:
    """In its place."""
    return 0


def gathered_area(setup: SyncSetup) -> dict[str, torch.Tensor]:
    """Whole tensors in a shared file."""
    shapes = hf_tensors(setup.spec, "lm")
    size = sum(math.prod(shape) for shape in shapes.values())
    flat = torch.from_file(str(GATHERED), shared=True, size=size, dtype=getattr(torch, setup.dtype))
    tensors, start = {}, 0
    for name, shape in shapes.items():
        tensors[name] = flat[start : start + math.prod(shape)].view(shape)
        start += math.prod(shape)
    return tensors


class Reader:
    """The far end of a stream without an engine."""

    def __init__(self, setup: SyncSetup) -> None:
        self.setup = setup

    def open(self) -> None:
        self.receiver = WeightReceiver(self.setup, 0, RingInbox(self.setup, 0))

    def drain(self, sync: int, fingerprints: bool) -> float:
        """Take every bucket and do nothing with it; seconds."""
        start = time.perf_counter()
        if not fingerprints:
            receiving.fingerprint = no_fingerprint
        try:
            for _ in self.receiver.stream(sync, sync):
                pass
        finally:
            receiving.fingerprint = receiving_fingerprint
        return time.perf_counter() - start

    def memcpy(self, num_bytes: int) -> float:
        """Copy as many bytes from memory to memory; seconds, the best of three."""
        if not hasattr(self, "_source"):
            self._source = torch.ones(num_bytes, dtype=torch.uint8)
            self._target = torch.zeros(num_bytes, dtype=torch.uint8)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self._target.copy_(self._source)
            times.append(time.perf_counter() - start)
        return min(times)


class Engine:
    """vLLM with our stream, and with the common way beside it."""

    def __init__(self, argument: tuple[SyncSetup, str]) -> None:
        self.setup, folder = argument
        sys.path.insert(0, str(HERE))
        from rlhf3d.rollout import vllm_start
        from rlhf3d.rollout.vllm_engine import VLLMEngine

        vllm_start.WORKER_EXTENSION = "gathered_worker.GatheredWorker"
        rollout = RolloutConfig(dtype=self.setup.dtype, kv_cache_gib=0.1, enforce_eager=True)
        self.engine = VLLMEngine(
            EngineSettings(folder, rollout, 256, CPUPlatform("benchmark"))
        ).start()

    def open(self) -> None:
        self.engine.open_weights(self.setup, 0, None)

    def update(self, sync: int) -> tuple[float, dict[str, float]]:
        """One sync; seconds and their parts."""
        start = time.perf_counter()
        report = self.engine.update_weights(sync, sync)
        parts = {"wait": report.wait_s, "verify": report.verify_s, "vLLM's packing": report.load_s}
        return time.perf_counter() - start, parts

    def load_gathered(self) -> float:
        """`load_weights` of what rank 0 laid out; seconds."""
        start = time.perf_counter()
        self.engine._llm.collective_rpc("load_gathered", args=(self.setup,))
        self.engine._llm.reset_prefix_cache()
        return time.perf_counter() - start


def measure(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """One dict of seconds a repeat; the first repeat (cold memory) is left out."""
    folder, spec = options.model, load_spec(options.model)
    layout = ParallelLayout(tp=options.tp, pp=options.pp)
    common = {
        "spec": spec,
        "layout": layout,
        "style": "local",
        "dtype": options.dtype,
        "timeout_s": 60.0,
    }
    sites, bucket = Sites.hosts([0] * layout.world_size), options.bucket_mib << 20
    to_engine = SyncSetup(name=f"bench-{os.getpid()}-e", sites=sites, bucket_bytes=bucket, **common)
    to_reader = SyncSetup(name=f"bench-{os.getpid()}-r", sites=sites, bucket_bytes=bucket, **common)
    meetings = tempfile.mkdtemp()
    engine = Child(Engine, (to_engine, folder))
    reader = Child(Reader, to_reader)
    sets = {
        setup.name: [
            Child(Trainer, (setup, folder, rank, f"{meetings}/{setup.name}"))
            for rank in range(layout.world_size)
        ]
        for setup in (to_engine, to_reader)
    }
    everyone = [engine, reader, *sets[to_engine.name], *sets[to_reader.name]]
    for child in everyone:
        child.wait()
    for child in sets[to_engine.name] + sets[to_reader.name] + [engine, reader]:
        child.start("open")
        child.wait()
    num_bytes = sum(math.prod(s) for s in hf_tensors(spec, "lm").values()) * to_engine.item_bytes
    print(f"{Path(folder).name}, {layout}, {options.dtype}: {num_bytes / 2**20:.0f} MiB")

    def timed(
        senders: list[Child], order: tuple[Any, ...], target: Child, call: tuple[Any, ...]
    ) -> tuple[float, Any]:
        start = time.perf_counter()
        for child in senders:
            child.start(*order)
        target.start(*call)
        result = target.wait()
        for child in senders:
            child.wait()
        return time.perf_counter() - start, result

    for repeat in range(options.repeats + 1):
        row: dict[str, float] = {}
        reader.start("memcpy", num_bytes)
        row["memcpy"] = reader.wait()
        senders = sets[to_reader.name]
        row["transfer"], _ = timed(
            senders, ("send", 2 * repeat, False), reader, ("drain", 2 * repeat, False)
        )
        row["verified"], _ = timed(
            senders, ("send", 2 * repeat + 1, True), reader, ("drain", 2 * repeat + 1, True)
        )
        senders = sets[to_engine.name]
        row["ours"], (_, parts) = timed(senders, ("send", repeat, True), engine, ("update", repeat))
        row |= {f"ours: {name}": seconds for name, seconds in parts.items()}
        start = time.perf_counter()
        for child in senders:
            child.start("gather")
        for child in senders:
            child.wait()
        row["gather: collectives"] = time.perf_counter() - start
        engine.start("load_gathered")
        row["gather: load_weights"] = engine.wait()
        row["gather"] = row["gather: collectives"] + row["gather: load_weights"]
        if repeat:
            yield row
    for child in everyone:
        child.end()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--tp", type=int, default=3)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    try:
        rows = list(measure(options))
    finally:
        GATHERED.unlink(missing_ok=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    for name, seconds in medians.items():
        spread = f"{min(row[name] for row in rows):.3f} to {max(row[name] for row in rows):.3f}"
        print(f"{name:26s} {seconds:7.3f} s   ({spread})")
    print(f"transfer / memcpy   {medians['transfer'] / medians['memcpy']:.2f}")
    print(f"verified / memcpy   {medians['verified'] / medians['memcpy']:.2f}")
    print(f"gather / ours       {medians['gather'] / medians['ours']:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
