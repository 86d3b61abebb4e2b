"""A rank's share of a model's checkpoint: weights, optimizer, schedule and random state.

Invariant: what is written does not depend on the layout that wrote it (megatron-core's
`fully_reshardable` format), so any layout can load it. Between `start_save` and `finish_save` the
model may change: what is written is the model at `start_save`. Files are checksummed as they are
written; nothing is read again.

Runs in: training rank.
"""

from __future__ import annotations

import inspect
import io
import random
from collections.abc import Iterable
from concurrent import futures
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf3d.checkpoints import optimizer_state
from rlhf3d.checkpoints.manifest import FileInfo, file_info
from rlhf3d.checkpoints.torch_dist import write_items
from rlhf3d.disk import NewFile

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import WriteItem
    from torch.distributed.checkpoint.storage import WriteResult

    from rlhf3d.engine.megatron_engine import MegatronEngine

Bucket = tuple[
    str, str, tuple[list[tuple["WriteItem", io.BytesIO]], list[tuple["WriteItem", Tensor]]]
]
"""What Megatron puts into one file: its path, its name, objects and tensors."""
# Told to Megatron's sharded_state_dict, and stored in the folder for its readers. Without singleton
# shards, layers and experts are stacked, and gate and up are one tensor.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
COMMON_FILE = "common.pt"
# Rank 0 alone writes these; they are in no rank's buckets.
RANK_0_FILES = (".metadata", COMMON_FILE, "metadata.json")


@dataclass(frozen=True)
class PendingSave:
    """A model's save that this rank has begun."""

    folder: Path
    request: Any
    written: Future[list[NewFile]]


def model_state(engine: MegatronEngine) -> dict[str, Any]:
    """Sharded state dict of each model chunk, with Megatron's own names whatever wraps it."""
    names = (
        ["model"] if len(engine.chunks) == 1 else [f"model{i}" for i in range(len(engine.chunks))]
    )
    return {
        name: chunk.sharded_state_dict(metadata=dict(METADATA))
        for name, chunk in zip(names, engine.chunks, strict=True)
    }


def start_save(
    folder: Path, engine: MegatronEngine, optimizer: bool, threads: Executor, wait: bool
) -> PendingSave:
    """Start writing this rank's share to the empty, shared `folder`: all ranks.

    Returns as soon as the model may change: once the share is copied or, with `wait`, handed to the
    operating system, which takes no copy and as long as that.
    """
    from megatron.core import dist_checkpointing

    state = model_state(engine)
    common: dict[str, Any] = {"world_size": dist.get_world_size()}
    states = []
    if optimizer:
        states = list(optimizer_state.param_states(engine.optimizer))
        state |= {
            "optimizer": optimizer_state.to_save(states, optimizer_state.entries_by_param(state))
        }
        common |= {"optimizer_step": optimizer_state.step_of(engine.optimizer)}
        common |= {"scheduler_steps": engine.scheduler.num_steps}
    state |= {"rng": _rng_object(_rng_state())}
    request = dist_checkpointing.save(
        {**state, **common},
        str(folder),
        async_sharded_save=True,
        content_metadata=METADATA,
        **_own_writer(),
    )
    # A synchronous save returns None, an asynchronous one its request.
    assert request is not None
    if dist.get_rank() == 0 and not (folder / COMMON_FILE).exists():
        # Newer versions keep it among the tensors, where older ones do not look; all versions read
        # this file.
        torch.save({**common, "content_metadata": METADATA}, folder / COMMON_FILE)
    # Megatron gives no function to a rank that has nothing to write; it still finishes with all.
    if request.async_fn is None:
        return PendingSave(folder, request, threads.submit(list))
    _, buckets, results = request.async_fn_args
    if not wait:
        # What the next update writes to: these are copied, the rest may be written as it is.
        live = _storages(chain.from_iterable(model.parameters() for model in engine.models))
        live |= _storages(chain.from_iterable(state.tensors.values() for state in states))
        buckets = [_copied(bucket, live) for bucket in buckets]
    written = threads.submit(_write, buckets, results, sync=not wait)
    if wait:  # for the writing alone: the disk is at work while the next model is planned
        futures.wait([written])
    return PendingSave(folder, request, written)


def _own_writer() -> dict[str, Any]:
    """The argument with which newer versions of Megatron write without nvidia-resiliency-ext."""
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def finish_save(pending: PendingSave, timeout_s: float) -> dict[str, FileInfo]:
    """Wait for the writer and complete the folder; return this rank's files.

    All ranks call it, in the order of the starts.
    """
    error: Exception | None = None
    files: dict[str, FileInfo] = {}
    try:
        for file in pending.written.result(timeout_s):
            file.sync()
            files[file.path.name] = FileInfo(file.num_bytes, file.crc32)
    except Exception as problem:  # the others must not wait for this rank in vain
        error = problem
    # Collective: a rank that failed takes part first and raises afterwards.
    for finish in pending.request.finalize_fns:
        finish()
    if error is not None:
        raise error
    if dist.get_rank() == 0:
        files |= {name: file_info(pending.folder / name) for name in RANK_0_FILES}
    return files


def _write(buckets: list[Bucket], results: Queue[Any], sync: bool) -> list[NewFile]:
    """Write a file for each bucket; Megatron's finalization takes from `results` what is where."""
    files: list[NewFile] = []
    places: dict[int, list[WriteResult]] = {}
    try:
        for path, _, (objects, tensors) in buckets:
            places[len(files)], file = write_items(Path(path), [*objects, *tensors])
            files.append(file)
    except Exception as error:
        results.put(error)  # finalization raises it on every rank
        raise
    results.put(places)
    for file in files if sync else ():
        file.sync()
    return files


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _copied(bucket: Bucket, live: set[int]) -> Bucket:
    """The bucket with all tensors in host memory that the next update does not touch.

    Megatron copies CPU tensors only if they are views of larger storage, and leaves GPU tensors on
    the device until they are written: neither would survive the next update.
    """
    path, name, (objects, tensors) = bucket
    copies = []
    for item, tensor in tensors:
        # By storage: a view shares its parameter's, but may begin at another address.
        shared = tensor.device.type != "cpu" or tensor.untyped_storage().data_ptr() in live
        copies.append((item, tensor.to("cpu", copy=True) if shared else tensor))
    return path, name, (objects, copies)


def load(folder: Path, engine: MegatronEngine, optimizer: bool) -> bool:
    """Load a saved model, with its optimizer and schedule.

    Return whether random state was there for this world size. All ranks call it. Of the optimizer's
    state each rank reads the parameters that it has a part of, one tensor at a time.
    """
    from megatron.core import dist_checkpointing

    wanted = {name: _without_extra_state(entries) for name, entries in model_state(engine).items()}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for name, chunk in zip(wanted, engine.chunks, strict=True):
        # Not strict, since extra state was left out of what is loaded; all else is checked below.
        missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
        assert not [*_without_extra_state(dict.fromkeys(missing)), *unexpected], (
            f"{missing}, {unexpected}"
        )
    if optimizer:
        _load_optimizer(folder, engine, loaded)
    else:
        # The optimizer's fp32 weights were made from those before the load.
        engine.optimizer.reload_model_params()
    # Random state is one object per rank: with another number of ranks there is none to match.
    same_world = bool(loaded.get("world_size") == dist.get_world_size())
    if same_world:
        _set_rng_state(dist_checkpointing.load({"rng": _rng_object(None)}, str(folder))["rng"])
    return same_world


def _without_extra_state(entries: dict[str, Any]) -> dict[str, Any]:
    """All except the quantization state of Transformer Engine's modules.

    It is empty, and other layer specs and versions, whose checkpoints load too, have it in other
    modules.
    """
    return {name: entry for name, entry in entries.items() if "_extra_state" not in name}


def _load_optimizer(folder: Path, engine: MegatronEngine, common: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    states = list(optimizer_state.param_states(engine.optimizer))
    entries = optimizer_state.entries_by_param(model_state(engine))
    for name in optimizer_state.names_to_load(states):
        wanted = {"part": optimizer_state.to_load(states, entries, name)}
        # The check wants the main replicas to cover every tensor; here a rank asks only for what
        # it has a part of, and the main replica of a parameter may have none.
        found = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
        optimizer_state.take(states, name, found["part"])
    optimizer_state.set_step(engine.optimizer, common["optimizer_step"])
    # step() adds to the counter and then sets each group's learning rate, which a plain
    # assignment of num_steps would leave as it was.
    engine.scheduler.num_steps = 0
    engine.scheduler.step(increment=common["scheduler_steps"])


def _rng_object(data: Any) -> Any:
    """Random state as an object of this rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("rng", data, (dist.get_world_size(),), (dist.get_rank(),))


def _rng_state() -> dict[str, Any]:
    """Of every generator of this process that training may draw from."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import _get_cuda_rng_state

    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "device": _get_cuda_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import _set_cuda_rng_state

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    _set_cuda_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["megatron"])
