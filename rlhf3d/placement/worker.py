"""One rank of a worker group: a process that holds its shard of the group's models.

Invariant: all ranks of a group get the same calls in the same order; a rank acts on its own shard only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from rlhf3d.config.groups import WorkerGroup
from rlhf3d.config.schema import Config
from rlhf3d.parallel.meeting import open_meeting
from rlhf3d.placement.cluster import use_node_interface

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf3d.batching.batch import Batch
    from rlhf3d.batching.dispatch import MiniBatch
    from rlhf3d.checkpoints.manifest import FileInfo
    from rlhf3d.checkpoints.sharded import PendingSave
    from rlhf3d.engine.megatron_engine import MegatronEngine
    from rlhf3d.engine.microbatch import UpdateResult
    from rlhf3d.resharding.sending import SendReport, WeightSender
    from rlhf3d.resharding.setup import SyncSetup


@dataclass(frozen=True)
class WorkerSetup:
    """What a rank is told at its start."""

    config: Config
    group: WorkerGroup
    rank: int
    total_steps: int
    output_dir: str


class TrainWorker:
    """Ray actor of one rank."""

    def __init__(self, setup: WorkerSetup) -> None:
        from rlhf3d.observability.logs import setup_logging
        from rlhf3d.parallel.platform import choose_platform

        self.setup = setup
        setup_logging(Path(setup.output_dir), f"{setup.group.name}_rank_{setup.rank}")
        self.platform = choose_platform(setup.config.cluster.platform)
        self.engines: dict[str, MegatronEngine] = {}
        self.streams: dict[str, WeightSender] = {}
        self._saves: list[PendingSave] = []
        self._writer: ThreadPoolExecutor | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Address at which the ranks meet; asked of rank 0."""
        return ray.util.get_node_ip_address(), open_meeting()

    def build(self, address: str, port: int, threads: int) -> None:
        """Join the process groups, then load the group's models."""
        use_node_interface()
        self.platform.prepare_worker(self._local_rank(), threads)
        from rlhf3d.parallel.megatron_init import initialize_megatron

        config = self.setup.config
        initialize_megatron(
            self.setup.group.layout,
            self.setup.rank,
            seed=config.trainer.seed,
            platform=self.platform,
            master_addr=address,
            master_port=port,
            timeout_s=config.cluster.phase_timeout_s,
        )
        self._load_models()

    def _local_rank(self) -> int:
        # Ray shows a worker only its own GPU.
        return 0

    def _load_models(self) -> None:
        from rlhf3d.algorithms.custom import load_custom_algorithms
        from rlhf3d.engine.megatron_engine import EngineContext, MegatronEngine
        from rlhf3d.models.spec import load_spec

        config = self.setup.config
        if config.algorithm.custom_path is not None:
            load_custom_algorithms(config.algorithm.custom_path)
        folder = self.setup.group.model
        context = EngineContext(
            spec=load_spec(folder),
            layout=self.setup.group.layout,
            layout_config=self.setup.group.layout_config,
            rank=self.setup.rank,
            platform=self.platform,
            dtype=config.model.dtype,
            device=self.platform.device(self._local_rank()),
            temperature=config.rollout.temperature,
            total_steps=self.setup.total_steps,
            skip_nonfinite=config.trainer.on_nonfinite == "skip",
            packed=config.model.use_remove_padding,
            offload=config.model.offload,
            shared=config.rollout.sleep,
        )
        make: dict[str, Callable[[], MegatronEngine]] = {
            "actor": lambda: MegatronEngine(context, "policy", folder, config.actor.optim),
            "critic": lambda: MegatronEngine(context, "value", folder, config.critic.optim),
            "ref": lambda: MegatronEngine(context, "policy", folder, None),
            "reward": lambda: MegatronEngine(context, "value", folder, None),
        }
        self.engines = {role: make[role]() for role in self.setup.group.roles}
        logging.getLogger(__name__).info("loaded %s on %s", sorted(self.engines), context.layout)

    def forward(
        self, role: str, batch: Batch, micro_batches: list[list[int]]
    ) -> dict[str, Tensor] | None:
        """Outputs of `role` for the rows of this data-parallel rank; see MegatronEngine.forward."""
        return self.engines[role].forward(batch, micro_batches)

    def update_actor(self, batch: Batch, mini_batches: list[MiniBatch]) -> UpdateResult:
        """PPO epochs over this data-parallel rank's shard."""
        from rlhf3d.algorithms.losses import PolicyLossSettings
        from rlhf3d.engine.objectives import PolicyObjective

        actor = self.setup.config.actor
        low = actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low
        high = actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high
        objective = PolicyObjective(
            loss_name=actor.policy_loss,
            settings=PolicyLossSettings(
                low, high, actor.clip_ratio_c, self.setup.config.algorithm.custom_kwargs
            ),
            loss_agg_mode=actor.loss_agg_mode,
            entropy_coeff=actor.entropy_coeff,
            kl_loss_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
            kl_loss_type=actor.kl_loss_type,
        )
        return self.engines["actor"].update(batch, mini_batches, objective)

    def update_critic(self, batch: Batch, mini_batches: list[MiniBatch]) -> UpdateResult:
        """Value regression over this data-parallel rank's shard."""
        from rlhf3d.engine.objectives import ValueObjective

        critic = self.setup.config.critic
        return self.engines["critic"].update(
            batch, mini_batches, ValueObjective(critic.cliprange_value, critic.loss_agg_mode)
        )

    def create_stream(self, setup: SyncSetup) -> None:
        """Make what this rank owns of a weight stream."""
        from rlhf3d.resharding.sending import WeightSender

        self.streams[setup.name] = WeightSender(
            setup, self.setup.rank, self.engines["actor"].params()
        )

    def open_stream(self, name: str, meeting: tuple[str, int] | None) -> None:
        """Open what others own; `meeting` is where the senders of messages meet, if there are any."""
        from rlhf3d.resharding.messages import Group

        stream = self.streams[name]
        group = None
        if meeting is not None:
            setup = stream.setup
            group = Group(
                setup.backend, self.setup.rank, setup.message_ranks, *meeting, setup.timeout_s
            )
        stream.open(group)

    def seal_stream(self, name: str) -> None:
        """Every process has opened the stream."""
        self.streams[name].seal()

    def send_weights(self, name: str, policy_version: int, sync: int) -> SendReport:
        """Send this rank's share of the actor's weights."""
        with self.engines["actor"].residence.at_work("weights"):
            return self.streams[name].send(policy_version, sync)

    def start_save(self, role: str, folder: str) -> None:
        """Copy this rank's share of a model and begin to write it; see checkpoints/sharded.py."""
        from rlhf3d.checkpoints.sharded import start_save

        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoint")
        optimizer = self.setup.config.trainer.save_optimizer
        with self.engines[role].residence.at_work("weights", "optimizer"):
            self._saves.append(
                start_save(Path(folder), self.engines[role], optimizer, self._writer)
            )

    def written(self) -> bool:
        """Whether every model under way is written."""
        return all(save.written.done() for save in self._saves)

    def finish_save(self) -> dict[str, FileInfo]:
        """Complete the model that was begun first; this rank's files of it."""
        from rlhf3d.checkpoints.sharded import finish_save

        return finish_save(self._saves.pop(0), self.setup.config.cluster.phase_timeout_s)

    def load(self, role: str, folder: str, optimizer: bool) -> bool:
        """Take over a saved model; whether the random state was there for as many ranks."""
        from rlhf3d.checkpoints.sharded import load

        with self.engines[role].residence.at_work("weights", "optimizer"):
            return load(Path(folder), self.engines[role], optimizer)
