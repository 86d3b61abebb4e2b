"""One rank of a worker group: a process that holds its shard of the group's models.

Invariant: all ranks of a group get the same calls in the same order; a rank acts on its own shard
only.
Runs in: training rank. The driver imports this file to name the methods it calls, so Megatron and
torch are imported inside them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from rlhf3d.config.derived import shares_prefixes
from rlhf3d.config.groups import WorkerGroup
from rlhf3d.config.schema import Config, ModelConfig, OptimConfig
from rlhf3d.imports import quick_imports
from rlhf3d.observability.profile.clock import this_machine
from rlhf3d.observability.profile.operations import OperationsSettings
from rlhf3d.observability.profile.recorder import span, start_recording, take_record
from rlhf3d.observability.profile.spans import Record
from rlhf3d.parallel.meeting import open_meeting
from rlhf3d.parallel.platform import Platform
from rlhf3d.placement.cluster import use_node_interface

if TYPE_CHECKING:
    import numpy as np

    from rlhf3d.algorithms.objectives import Objective
    from rlhf3d.batching.dispatch import MiniBatch
    from rlhf3d.batching.packed import PackedRows
    from rlhf3d.checkpoints.manifest import FileInfo
    from rlhf3d.checkpoints.sharded import PendingSave
    from rlhf3d.engine.megatron_engine import MegatronEngine
    from rlhf3d.engine.microbatch import UpdateResult
    from rlhf3d.models.megatron import Role
    from rlhf3d.resharding.sending import SendReport, WeightSender
    from rlhf3d.resharding.setup import SyncSetup

HEAD_OF_ROLE: dict[str, Role] = {
    "actor": "policy",
    "ref": "policy",
    "critic": "value",
    "reward": "value",
}
"""What each model of a worker group ends in."""
READ_BY_DRIVER = ("logprobs", "values")
"""Outputs of a forward pass that a step uses."""


@dataclass(frozen=True)
class WorkerSetup:
    """What the ranks of a worker group are started with; the same for all of them."""

    group: WorkerGroup
    platform: Platform
    model: ModelConfig
    optimizers: Mapping[str, OptimConfig]
    """By role, of the models that learn."""
    temperature: float
    """Divides the logits, as in sampling."""
    total_steps: int
    """Training steps of the run, for the schedule of the learning rate."""
    seed: int
    custom_algorithms: str | None
    """Python file with the user's own policy losses."""
    skip_nonfinite: bool
    """See `EngineContext`."""
    shares_device: bool
    """Engines that sleep take the device's memory between calls."""
    save_optimizer: bool
    timeout_s: float
    """Deadline of every collective, and of a save."""
    output_dir: str


def worker_setup(
    config: Config, group: WorkerGroup, platform: Platform, total_steps: int
) -> WorkerSetup:
    """The part of a run's configuration that the ranks of one group need."""
    return WorkerSetup(
        group=group,
        platform=platform,
        model=config.model,
        optimizers={"actor": config.actor.optim, "critic": config.critic.optim},
        temperature=config.rollout.temperature,
        total_steps=total_steps,
        seed=config.trainer.seed,
        custom_algorithms=config.algorithm.custom_path,
        skip_nonfinite=config.trainer.on_nonfinite == "skip",
        shares_device=config.rollout.sleep,
        save_optimizer=config.trainer.save_optimizer,
        timeout_s=config.cluster.phase_timeout_s,
        output_dir=config.trainer.output_dir,
    )


class TrainWorker:
    """Ray actor of one rank."""

    def __init__(self, setup: WorkerSetup, rank: int) -> None:
        from rlhf3d.observability.logs import setup_logging

        self.setup, self.rank = setup, rank
        setup_logging(Path(setup.output_dir), f"{setup.group.name}_rank_{rank}", prints=True)
        self.engines: dict[str, MegatronEngine] = {}
        self.streams: dict[str, WeightSender] = {}
        self._saves: list[PendingSave] = []
        self._writer: ThreadPoolExecutor | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Open the address at which the ranks meet; asked of rank 0."""
        return ray.util.get_node_ip_address(), open_meeting()

    def build(self, address: str, port: int, threads: int) -> None:
        """Join the process groups, then load the group's models."""
        use_node_interface()
        # Before Megatron is imported, which is patched here.
        with quick_imports():
            self.setup.platform.prepare_worker(threads)
            from rlhf3d.parallel.megatron_init import initialize_megatron

        initialize_megatron(
            self.setup.group.layout,
            self.rank,
            seed=self.setup.seed,
            platform=self.setup.platform,
            master_addr=address,
            master_port=port,
            timeout_s=self.setup.timeout_s,
        )
        self._load_models()
        # Of copies that loading has made.
        self.setup.platform.free_cached()

    def _load_models(self) -> None:
        from rlhf3d.algorithms.custom import load_custom_algorithms
        from rlhf3d.engine.megatron_engine import EngineContext, MegatronEngine
        from rlhf3d.models.spec import load_spec

        setup, group = self.setup, self.setup.group
        if setup.custom_algorithms is not None:
            # An objective names its loss: the name must be known in this process too.
            load_custom_algorithms(setup.custom_algorithms)
        context = EngineContext(
            spec=load_spec(group.model),
            layout=group.layout,
            layout_config=group.layout_config,
            rank=self.rank,
            platform=setup.platform,
            dtype=setup.model.dtype,
            device=setup.platform.device(),
            temperature=setup.temperature,
            total_steps=setup.total_steps,
            skip_nonfinite=setup.skip_nonfinite,
            packed=setup.model.use_remove_padding,
            share_prefixes=shares_prefixes(setup.model, group.layout_config, setup.platform.kind),
            offload=setup.model.offload,
            shared=setup.shares_device,
        )
        for role in group.roles:
            head = HEAD_OF_ROLE[role]
            optimizer = setup.optimizers.get(role)
            self.engines[role] = MegatronEngine(context, head, group.model, optimizer)
        logging.getLogger(__name__).info("loaded %s on %s", sorted(self.engines), context.layout)

    @property
    def _answers(self) -> bool:
        """Whether the driver reads this rank's outputs: others of its replica have the same."""
        return self.rank in self.setup.group.layout.collectors()

    def forward(
        self, phase: str, role: str, rows: PackedRows, micro_batches: list[list[int]]
    ) -> dict[str, np.ndarray] | None:
        """Compute log-probs or values of `role` for this replica's rows.

        See `MegatronEngine.forward`; packed as `pack_columns` does, None on ranks that nobody asks.
        """
        from rlhf3d.batching.packed import pack_columns

        batch = rows.unpack()
        with span(phase, "call"):
            outputs = self.engines[role].forward(batch, micro_batches)
        if outputs is None or not self._answers:
            return None
        read = {name: column for name, column in outputs.items() if name in READ_BY_DRIVER}
        return pack_columns(read, batch["response_lengths"])

    def update(
        self, role: str, rows: PackedRows, mini_batches: list[MiniBatch], objective: Objective
    ) -> tuple[UpdateResult, np.ndarray | None] | None:
        """Take the optimizer steps of `role` on this replica's rows: `MegatronEngine.update`.

        Its log-probs, where it has them, come packed and beside it; None as of `forward`.
        """
        from rlhf3d.batching.packed import pack_columns

        batch = rows.unpack()
        with span(f"update_{role}", "call"):
            result = self.engines[role].update(batch, mini_batches, objective)
        if not self._answers:
            return None
        if result.logprobs is None:
            return result, None
        packed = pack_columns({"logprobs": result.logprobs}, batch["response_lengths"])
        return replace(result, logprobs=None), packed["logprobs"]

    def peak_gib(self) -> float:
        """Return the most memory that this rank has had so far; see `Platform.peak_gib`."""
        return self.setup.platform.peak_gib()

    def start_profile(self, operations: OperationsSettings | None) -> str:
        """Begin to record what this rank does; return whose clock it goes by."""
        start_recording(self.setup.platform.clock(), operations)
        for engine in self.engines.values():
            engine.profile()
        return this_machine()

    def clock_ns(self) -> int:
        """Return the time on the clock of this rank's machine."""
        return time.monotonic_ns()

    def take_profile(self, began: int) -> Record | None:
        """End the recording; return it. `began`: of the step, on this machine's clock."""
        record = take_record(began)
        for engine in self.engines.values():
            engine.profile()
        return record

    def create_stream(self, setup: SyncSetup) -> None:
        """Make what this rank owns of a weight stream."""
        from rlhf3d.resharding.sending import WeightSender

        params = self.engines["actor"].params()
        self.streams[setup.name] = WeightSender(setup, self.rank, params)

    def open_stream(self, name: str, meeting: tuple[str, int] | None) -> None:
        """Open what other ranks own; the senders of messages, if any, meet at `meeting`."""
        from rlhf3d.resharding.messages import Group

        stream = self.streams[name]
        group = None
        if meeting is not None:
            setup = stream.setup
            names = setup.message_ranks
            group = Group(setup.backend, self.rank, names, *meeting, setup.timeout_s)
        stream.open(group)

    def seal_stream(self, name: str) -> None:
        """Remove the names of the stream's files, now that every process has opened it."""
        self.streams[name].seal()

    def send_weights(self, name: str, policy_version: int, sync: int) -> SendReport:
        """Send this rank's share of the actor's weights."""
        with span("sync_weights", "call"), self.engines["actor"].states.on_device("weights"):
            return self.streams[name].send(policy_version, sync)

    def close_stream(self, name: str) -> None:
        """Release what this rank has of a weight stream."""
        self.streams.pop(name).close()

    def start_save(self, role: str, folder: str, wait: bool) -> None:
        """Begin to write this rank's share of a model; see `checkpoints/sharded.py`."""
        from rlhf3d.checkpoints.sharded import start_save

        if self._writer is None:
            # One thread: models are written in the order in which their saves start.
            self._writer = ThreadPoolExecutor(1, "checkpoint")
        engine, optimizer = self.engines[role], self.setup.save_optimizer
        with engine.states.on_device("weights", "optimizer"):
            save = start_save(Path(folder), engine, optimizer, self._writer, wait)
            self._saves.append(save)

    def written(self) -> bool:
        """Return whether every save that was started is written."""
        return all(save.written.done() for save in self._saves)

    def finish_save(self) -> dict[str, FileInfo]:
        """Complete the save that was started first; return this rank's files of it."""
        from rlhf3d.checkpoints.sharded import finish_save

        return finish_save(self._saves.pop(0), self.setup.timeout_s)

    def load(self, role: str, folder: str, optimizer: bool) -> bool:
        """Load a saved model; return whether it holds the random state of as many ranks."""
        from rlhf3d.checkpoints.sharded import load

        engine = self.engines[role]
        with engine.states.on_device("weights", "optimizer"):
            return load(Path(folder), engine, optimizer)
