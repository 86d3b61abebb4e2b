"""The ranks of one worker group as the driver sees them: whole batches in, whole batches out.

Invariant: all ranks of a data-parallel replica get the same rows and micro-batches; what comes back is in the batch's
own row order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.dispatch import padding_share, split_forward, split_update
from rlhf3d.batching.micro import UpdatePlan
from rlhf3d.config.derived import micro_batching_of
from rlhf3d.config.groups import WorkerGroup
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.placement.resources import Placement
from rlhf3d.placement.waiting import gather
from rlhf3d.placement.worker import TrainWorker, WorkerSetup

FORWARD_COLUMNS = ("input_ids", "prompt_lengths", "response_lengths", "response_mask")


class TrainGroup:
    """Handles of the ranks that hold a worker group's models."""

    def __init__(
        self,
        config: Config,
        group: WorkerGroup,
        placement: Placement,
        reserved: PlacementGroup,
        threads: Sequence[int],
        total_steps: int,
        environment: Mapping[str, str],
    ) -> None:
        """Start the processes, with these variables, and begin to load their models, which `wait_ready` ends; CPU
        `threads` are by rank."""
        self.name, self.layout, self._reserved = group.name, group.layout, reserved
        self.timeout_s, self.startup_timeout_s = (
            config.cluster.phase_timeout_s,
            config.cluster.startup_timeout_s,
        )
        self.micro_batching = {role: micro_batching_of(config, role) for role in group.roles}
        self.cost = sequence_cost(load_spec(group.model))
        self._padding: dict[str, float] = {}
        self.max_response_tokens = config.data.max_response_length
        self._bundles = placement.groups[group.name]
        self.workers = [
            ray.remote(TrainWorker)
            .options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(reserved, bundle),
                runtime_env={"env_vars": {**environment, "OMP_NUM_THREADS": str(threads[rank])}},
                **placement.options[group.name],
            )
            .remote(WorkerSetup(config, group, rank, total_steps, config.trainer.output_dir))
            for rank, bundle in enumerate(self._bundles)
        ]
        address, port = self.meeting_place()
        self._starting = {
            self._name(rank): worker.build.remote(address, port, threads[rank])
            for rank, worker in enumerate(self.workers)
        }

    def wait_ready(self) -> None:
        """Wait until every rank has loaded its models."""
        gather("load models", self._starting, self.startup_timeout_s)

    def _name(self, rank: int) -> str:
        at = self.layout.coords(rank)
        context = f" cp{at.cp}" if self.layout.cp > 1 else ""
        return f"{self.name} rank {rank} (tp{at.tp} pp{at.pp} dp{at.dp}{context})"

    def start_all(self, method: str, *args: Any) -> dict[str, ray.ObjectRef]:
        """Start the same call on every rank, by name."""
        return {self._name(r): getattr(w, method).remote(*args) for r, w in enumerate(self.workers)}

    def call_all(self, phase: str, method: str, *args: Any) -> list[Any]:
        """The same call on every rank; results by rank."""
        return gather(phase, self.start_all(method, *args), self.timeout_s)

    def first_rank_here(self) -> int | None:
        """The first rank on the driver's node, if any."""
        nodes = placement_group_table(self._reserved)["bundles_to_node_id"]
        here = ray.get_runtime_context().get_node_id()
        return next(
            (rank for rank, bundle in enumerate(self._bundles) if nodes[bundle] == here), None
        )

    def meeting_place(self) -> tuple[str, int]:
        """Address and free port of rank 0's host."""
        first = {self._name(0): self.workers[0].rendezvous.remote()}
        address, port = gather("start", first, self.startup_timeout_s)[0]
        return address, port

    def _dispatch(
        self, phase: str, method: str, args_of_dp: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """One argument list a data-parallel replica; results of the last stages, by data-parallel rank."""
        shared = [tuple(ray.put(arg) for arg in args) for args in args_of_dp]
        calls = {
            self._name(rank): getattr(worker, method).remote(*shared[self.layout.coords(rank).dp])
            for rank, worker in enumerate(self.workers)
        }
        results = gather(phase, calls, self.timeout_s)
        return [results[rank] for rank in self.layout.collectors()]

    def forward(self, phase: str, role: str, batch: Batch) -> dict[str, Tensor]:
        """Response-aligned outputs [N, R] of `role` for all rows: logprobs and entropy, or values."""
        batch = batch.only(FORWARD_COLUMNS)
        shares = split_forward(batch, self.micro_batching[role], self.layout, self.cost)
        if phase.isidentifier():  # a check such as the canary is no phase of the step
            self._padding[f"perf/padding_share/{phase}"] = padding_share(batch, shares)
        args = [(role, batch.select(share.rows), share.micro_batches) for share in shares]
        results = self._dispatch(phase, "forward", args)
        merged = {name: torch.zeros_like(batch["response_mask"]) for name in results[0]}
        for share, result in zip(shares, results, strict=True):
            for name, value in result.items():
                merged[name][share.rows] = value
        return merged

    def update(self, role: str, batch: Batch, plan: UpdatePlan) -> dict[str, float]:
        """Update `role` (actor or critic) over the batch; global metrics, those of earlier forward passes with them."""
        shares = split_update(batch, plan, self.layout, self.max_response_tokens, self.cost)
        args = [(batch.select(share.rows), share.mini_batches) for share in shares]
        results = self._dispatch(f"update_{role}", f"update_{role}", args)
        metrics = {name: sum(r.shares[name] for r in results) for name in results[0].shares}
        metrics |= {f"{role}/grad_norm": results[0].grad_norm, f"{role}/lr": results[0].lr}
        metrics[f"{role}/skipped_steps"] = float(len(results[0].skipped))
        for problem in results[0].skipped:
            logging.getLogger(__name__).warning(
                "update_%s left out an optimizer step: %s", role, problem
            )
        metrics[f"perf/padding_share/update_{role}"] = padding_share(batch, shares)
        padding, self._padding = self._padding, {}
        return {**metrics, **padding}


def sequence_cost(spec: ModelSpec) -> SequenceCost:
    """Operations of a model's decoder layers; the vocabulary head, linear in the response, is left out.

    A layer with p weights that a token meets does 2p operations a token, and causal attention over L tokens
    4·heads·head_dim·L²/2: their ratio is heads·head_dim·L²/p.
    """
    ffn = spec.moe_ffn_size * spec.experts_per_token if spec.num_experts else spec.ffn_size
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    weights = spec.hidden_size * (heads * spec.head_dim + 3 * ffn)
    return SequenceCost(spec.num_heads * spec.head_dim / weights)
