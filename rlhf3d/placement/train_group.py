"""The ranks of one worker group as the driver sees them: a batch in, a batch out.

Invariant: all ranks of a data-parallel replica get the same rows and micro-batches; what comes back
is in the batch's own row order.
Runs in: driver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, TypeVarTuple

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from rlhf3d.algorithms.objectives import Objective
from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.dispatch import (
    Share,
    for_update,
    padding_share,
    shared_prefix_share,
    split_forward,
    split_update,
)
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.batching.packed import pack, put_in_rows
from rlhf3d.config.schema import ClusterConfig
from rlhf3d.engine.microbatch import UpdateResult
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.placement.calls import Reply, start_call
from rlhf3d.placement.resources import Placement, starts_with
from rlhf3d.placement.waiting import gather
from rlhf3d.placement.worker import TrainWorker, WorkerSetup

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

# What a forward pass reads; the other columns stay on the driver.
FORWARD_COLUMNS = ("input_ids", "prompt_lengths", "response_lengths", "response_mask")


class TrainGroup:
    """Handles of the ranks that hold a worker group's models."""

    def __init__(
        self,
        setup: WorkerSetup,
        cluster: ClusterConfig,
        placement: Placement,
        reserved: PlacementGroup,
        threads: Sequence[int],
        micro_batching: Mapping[str, MicroBatching],
        max_response_tokens: int,
    ) -> None:
        """Start the processes, each with its CPU `threads`, and begin to load their models.

        `micro_batching` is by role. `wait_ready` ends the loading.
        """
        group = setup.group
        self.name, self.layout = group.name, group.layout
        self.timeout_s = cluster.phase_timeout_s
        self.startup_timeout_s = cluster.startup_timeout_s
        self.micro_batching = micro_batching
        self.max_response_tokens = max_response_tokens
        self.cost = sequence_cost(load_spec(group.model))
        self._padding: dict[str, float] = {}
        """Padding of the forward passes since the last update, as metrics."""
        self.meanwhile: Callable[[], bool] | None = None
        """What the driver does while the ranks compute, see `gather`."""
        self._reserved = reserved
        self._bundles = placement.groups[group.name]
        environment = setup.platform.environment("trainer", setup.model.dtype)
        options = placement.options[group.name] | starts_with(environment)
        self.workers: list[Any] = []
        for rank, bundle in enumerate(self._bundles):
            actor = ray.remote(TrainWorker).options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(reserved, bundle),
                **options,
            )
            self.workers.append(actor.remote(setup, rank))
        address, port = self.meeting_place()
        self._starting = {
            self._name(rank): start_call(worker, TrainWorker.build, address, port, threads[rank])
            for rank, worker in enumerate(self.workers)
        }

    def wait_ready(self) -> None:
        """Wait until every rank has loaded its models."""
        gather("load models", self._starting, self.startup_timeout_s)

    def _name(self, rank: int) -> str:
        at = self.layout.coords(rank)
        context = f" cp{at.cp}" if self.layout.cp > 1 else ""
        return f"{self.name} rank {rank} (tp{at.tp} pp{at.pp} dp{at.dp}{context})"

    def start_all(
        self,
        method: Callable[Concatenate[TrainWorker, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> dict[str, Reply[R]]:
        """Start the same call on every rank, by the rank's name."""
        return {
            self._name(rank): start_call(worker, method, *args, **kwargs)
            for rank, worker in enumerate(self.workers)
        }

    def call_all(
        self,
        phase: str,
        method: Callable[Concatenate[TrainWorker, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[R]:
        """Make the same call on every rank; return the results by rank."""
        return gather(phase, self.start_all(method, *args, **kwargs), self.timeout_s)

    def ranks(self) -> dict[str, Any]:
        """The actors by name."""
        names = map(self._name, range(len(self.workers)))
        return dict(zip(names, self.workers, strict=True))

    def peak_gib(self) -> float:
        """Return the most memory, GiB, that any rank has had so far; see `Platform.peak_gib`."""
        return max(self.call_all("memory", TrainWorker.peak_gib))

    def first_rank_here(self) -> int | None:
        """Return the first rank on the driver's node, if any."""
        nodes = placement_group_table(self._reserved)["bundles_to_node_id"]
        here = ray.get_runtime_context().get_node_id()
        for rank, bundle in enumerate(self._bundles):
            if nodes[bundle] == here:
                return rank
        return None

    def meeting_place(self) -> tuple[str, int]:
        """Return an address and a free port of rank 0's host."""
        first = {self._name(0): start_call(self.workers[0], TrainWorker.rendezvous)}
        return gather("start", first, self.startup_timeout_s)[0]

    def _dispatch(
        self,
        phase: str,
        method: Callable[[TrainWorker, *Ts], R],
        args_of_dp: Iterable[tuple[*Ts]],
    ) -> list[R]:
        """Call with one list of arguments per data-parallel replica.

        Return the results of the ranks whose outputs count, by data-parallel rank.
        """
        # Put once: the ranks of a replica read the same copy. One after the other, as they are
        # made: there never are two copies of the batch here.
        shared = [tuple(map(ray.put, args)) for args in args_of_dp]
        calls: dict[str, Reply[R]] = {}
        for rank, worker in enumerate(self.workers):
            args = shared[self.layout.coords(rank).dp]
            calls[self._name(rank)] = start_call(worker, method, *args)
        results = gather(phase, calls, self.timeout_s, self.meanwhile)
        return [results[rank] for rank in self.layout.collectors()]

    def forward(
        self, phase: str, role: str, batch: Batch, measure_padding: bool = True
    ) -> dict[str, Tensor]:
        """Compute response-aligned outputs [N, R] of `role`: logprobs and entropy, or values.

        The padding of the pass becomes a metric of the phase, returned by the next `update`.
        """
        batch = batch.only(FORWARD_COLUMNS)
        shares = split_forward(batch, self.micro_batching[role], self.layout, self.cost)
        if measure_padding:
            self._padding |= _position_metrics(phase, batch, shares)
        args = ((phase, role, pack(batch, share.rows), share.micro_batches) for share in shares)
        results = self._dispatch(phase, TrainWorker.forward, args)
        # None only on ranks that nobody asks.
        outputs = [result for result in results if result is not None]
        rows_of, merged = [share.rows for share in shares], {}
        for name in outputs[0]:
            merged[name] = _in_row_order(batch, rows_of, [columns[name] for columns in outputs])
        return merged

    def update(
        self, role: str, batch: Batch, plan: UpdatePlan, objective: Objective
    ) -> tuple[dict[str, float], Tensor | None]:
        """Update `role` (actor or critic) over the batch.

        Return global metrics, with the padding of the forward passes since the last update; and
        log-probs [N, R] before the update, where the objective's old policy is the current one.
        """
        phase, batch = f"update_{role}", for_update(batch)
        shares = split_update(
            batch,
            plan,
            self.layout,
            self.max_response_tokens,
            self.cost,
            objective.whole_trajectories,
        )
        args = ((role, pack(batch, share.rows), share.mini_batches, objective) for share in shares)
        replies = self._dispatch(phase, TrainWorker.update, args)
        results = [reply[0] for reply in replies if reply is not None]
        # Of any rank: a step is left out on all of them or on none.
        for problem in results[0].skipped:
            logging.getLogger(__name__).warning("%s left out an optimizer step: %s", phase, problem)
        padding, self._padding = self._padding, {}
        metrics = {
            **_update_metrics(role, results),
            **_position_metrics(phase, batch, shares),
            **padding,
        }
        if not objective.old_is_current:
            return metrics, None
        logprobs = [reply[1] for reply in replies if reply is not None and reply[1] is not None]
        return metrics, _in_row_order(batch, [share.rows for share in shares], logprobs)


def _in_row_order(
    batch: Batch, rows_of: Sequence[Sequence[int]], parts: Sequence[np.ndarray]
) -> Tensor:
    """A column [N, R] from what the replicas packed of their rows."""
    column = torch.zeros_like(batch["response_mask"])
    for rows, part in zip(rows_of, parts, strict=True):
        put_in_rows(column, rows, batch["response_lengths"], part)
    return column


def _position_metrics(phase: str, batch: Batch, shares: Sequence[Share]) -> dict[str, float]:
    return {
        f"perf/padding_share/{phase}": padding_share(shares),
        f"perf/shared_prefix_share/{phase}": shared_prefix_share(batch, shares),
    }


def _update_metrics(role: str, results: Sequence[UpdateResult]) -> dict[str, float]:
    """Metrics of an update from those of its data-parallel ranks."""
    first = results[0]
    metrics: dict[str, float] = {}
    # Each replica gives its share of a mean over the mini-batch of all, so the sum is the mean.
    for name in first.shares:
        metrics[name] = sum(result.shares[name] for result in results)
    metrics[f"{role}/grad_norm"] = first.grad_norm
    metrics[f"{role}/lr"] = first.lr
    metrics[f"{role}/skipped_steps"] = float(len(first.skipped))
    return metrics


def sequence_cost(spec: ModelSpec) -> SequenceCost:
    """Operations of a model's decoder layers, for balancing sequences over replicas.

    The vocabulary head, linear in the response, is left out. A layer with p weights that a token
    meets does 2p operations a token, and causal attention over L tokens 4·heads·head_dim·L²/2:
    their ratio is heads·head_dim·L²/p.
    """
    ffn = spec.moe_ffn_size * spec.experts_per_token if spec.num_experts else spec.ffn_size
    # Per head_dim: queries and the output projection, keys and values. 3: gate, up and down.
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    weights = spec.hidden_size * (heads * spec.head_dim + 3 * ffn)
    return SequenceCost(spec.num_heads * spec.head_dim / weights)
