"""Adam's moments and fp32 weights of a model, in the shapes of its parameters.

Invariant: a save copies at most the parameters that several data-parallel ranks share, each element
is written by one rank, and after a load each parameter counts its own steps. Names and shapes are
those of megatron-core's `fully_reshardable` format, for any split over ranks.

megatron-core's own code for that format is not called: it holds the complete state several times on
every data-parallel rank, and after a load gives all parameters one step counter, which torch's Adam
then advances once for each of them.

Runs in: training rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PREFIX = "optimizer.state"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """Elements [start, end) of a flattened parameter, on rank `rank` of the data-parallel group."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class ParamState:
    """The optimizer's state of one parameter, as far as this rank holds it."""

    param: torch.nn.Parameter
    parts: tuple[Part, ...]
    """Which rank holds what; together the complete parameter, or each all of it."""
    group: Any
    """The data-parallel group that shares it."""
    tensors: dict[str, Tensor]
    """By name the flat [end - start] values of this rank's part; empty where it has none."""

    @property
    def owner(self) -> int:
        """The rank that writes it: of those that hold most of it the first."""
        return max(self.parts, key=lambda part: (part.end - part.start, -part.rank)).rank

    def local(self) -> Part | None:
        """This rank's part."""
        return next((part for part in self.parts if part.rank == dist.get_rank(self.group)), None)


def param_states(optimizer: Any) -> Iterator[ParamState]:
    """State of every parameter, in one order on all ranks of a data-parallel group."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Megatron's stand-in for an optimizer without parameters; it lacks the fields read below.
        if getattr(inner, "is_stub_optimizer", False):
            continue
        yield from (_shared if isinstance(inner, DistributedOptimizer) else _replicated)(inner)


def _shared(optimizer: Any) -> Iterator[ParamState]:
    """Of the distributed optimizer: each rank holds one slice of each bucket, which may start and
    end inside parameters.
    """
    group = optimizer.data_parallel_group
    for buffer in optimizer.buffers:
        for param, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            # Even: Megatron pads each bucket to a multiple of the group's size. `start`, `end` and
            # `offset` all count elements from the start of the buffer.
            share = bucket.grad_data.numel() // group.size()
            cuts = [bucket.offset + rank * share for rank in range(group.size() + 1)]
            spans = [(max(start, low), min(end, high)) for low, high in pairwise(cuts)]
            parts = tuple(
                Part(rank, a - start, b - start) for rank, (a, b) in enumerate(spans) if a < b
            )
            tensors: dict[str, Tensor] = {}
            # The map has only the parameters of which this rank's slice holds a part.
            if param in optimizer.model_param_group_index_map:
                number, order = optimizer.model_param_group_index_map[param]
                inner = optimizer.optimizer
                tensors = _tensors(inner, param, inner.param_groups[number]["params"][order])
            yield ParamState(param, parts, group, tensors)


def _replicated(optimizer: Any) -> Iterator[ParamState]:
    """Of optimizers that keep the complete state on every data-parallel rank."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # Of bf16 models the optimizer has fp32 copies of the weights, of others the weights themselves.
    halves = chain.from_iterable(getattr(optimizer, "float16_groups", []))
    masters = chain.from_iterable(getattr(optimizer, "fp32_from_float16_groups", []))
    model = {id(master): half for half, master in zip(halves, masters, strict=True)}
    groups = optimizer.optimizer.param_groups
    for main in chain.from_iterable(of_group["params"] for of_group in groups):
        param = model.get(id(main), main)
        # Megatron marks experts' weights with allreduce=False: fewer ranks share them.
        expert = not getattr(param, "allreduce", True)
        shared_by = parallel_state.get_expert_data_parallel_group() if expert else group
        parts = tuple(Part(rank, 0, param.numel()) for rank in range(shared_by.size()))
        yield ParamState(param, parts, shared_by, _tensors(optimizer.optimizer, param, main))


def _tensors(inner: Any, param: torch.nn.Parameter, main: Tensor) -> dict[str, Tensor]:
    """Moments (made before the first step) and fp32 weights that are no view of the parameter."""
    state = inner.state[main]
    # torch's Adam makes step and moments together, and only where the state is empty: with
    # moments put here first it would miss its counter.
    if not state and _counts_by_param(inner):
        state["step"] = torch.tensor(0.0)
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(main.data)
    found = {name: state[name].flatten() for name in MOMENTS}
    # Of an fp32 model the optimizer's weights are the model's own, which are saved as such.
    return found if param.dtype == torch.float32 else {"param": main.detach().flatten(), **found}


def _counts_by_param(inner: Any) -> bool:
    """Whether each parameter counts its steps, as in torch's Adam, or each group (fused ones)."""
    # On GPUs the inner optimizer is Transformer Engine's or Apex's FusedAdam, a step per group.
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _groups(optimizer: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Inner optimizers with each of their groups that has parameters."""
    for megatron in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = megatron.optimizer
        yield from (
            (inner, group)
            for group in (inner.param_groups if inner is not None else ())
            if group["params"]
        )


def step_of(optimizer: Any) -> int:
    """Optimizer steps taken."""
    steps = set()
    for inner, group in _groups(optimizer):
        counters = (
            [inner.state.get(main, {}) for main in group["params"]]
            if _counts_by_param(inner)
            else [group]
        )
        steps |= {int(counter.get("step", 0)) for counter in counters}
    assert len(steps) <= 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_step(optimizer: Any, step: int) -> None:
    """Set every step counter: one per parameter where the optimizer has those."""
    for inner, group in _groups(optimizer):
        if not _counts_by_param(inner):
            group["step"] = step
            continue
        for main in group["params"]:
            if main in inner.state:
                inner.state[main]["step"] = torch.tensor(float(step))


def entries_by_param(model_state: dict[str, Any]) -> dict[int, Any]:
    """id of a parameter -> its ShardedTensor (or factory) in the model's sharded state dict."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    entries = nested_values(model_state)
    return {
        id(entry.data): entry
        for entry in entries
        if isinstance(getattr(entry, "data", None), torch.Tensor)
    }


def _sharded(entry: Any, name: str, data: Tensor, replica_id: tuple[int, ...]) -> Any:
    """A tensor of the state, cut over ranks as `entry`, its parameter, is."""
    fields: dict[str, Any] = {
        "key": f"{PREFIX}.{name}.{entry.key}",
        "data": data.view(entry.data.shape),
    }
    # A ShardedTensorFactory has no dtype field; it builds its tensors from `data`.
    if hasattr(entry, "dtype"):
        fields["dtype"] = data.dtype
    return replace(entry, **fields, replica_id=replica_id)


def to_save(states: Sequence[ParamState], entries: dict[int, Any]) -> dict[str, Any]:
    """Sharded tensors that this rank writes. A collective call of each data-parallel group."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    sharded: dict[str, Any] = {}
    for group, param in {state.group: state.param for state in states}.items():
        # Messages between some ranks take the group's communicator only where all have made it.
        dist.all_reduce(param.new_zeros(1), group=group)
    for number, state in enumerate(states):
        entry = entries[id(state.param)]
        # Its last number is the data-parallel rank, which `owner` replaces: whichever rank of the
        # group has the complete tensor writes it as the main replica.
        replica_id = (*entry.replica_id[:-1], 0)
        if not is_main_replica(replica_id):  # another tensor- or pipeline-parallel rank writes it
            continue
        names = ("param", *MOMENTS) if state.param.dtype != torch.float32 else MOMENTS
        for name in names:
            whole = collect(state, name)
            if whole is not None and dist.get_rank(state.group) == state.owner:
                sharded[f"{name}.{number}"] = _sharded(entry, name, whole, replica_id)
    return sharded


def collect(state: ParamState, name: str) -> Tensor | None:
    """The complete flat tensor on its owner, None elsewhere; a view if the owner holds all of it.

    Sent as one group of messages, in the communicator that the group has: for single messages NCCL
    would open one per pair of ranks, when GPU memory is at its fullest.
    """
    rank, mine = dist.get_rank(state.group), state.tensors.get(name)
    if any(
        # The slices of the distributed optimizer cut few parameters; the others need no messages.
        part.rank == state.owner and part.end - part.start == state.param.numel()
        for part in state.parts
    ):
        return mine
    if rank != state.owner:
        if mine is not None:
            _exchange(
                [
                    dist.P2POp(
                        dist.isend, mine.contiguous(), group=state.group, group_peer=state.owner
                    )
                ]
            )
        return None
    assert mine is not None
    whole, coming = mine.new_empty(state.param.numel()), []
    for part in state.parts:
        # A view: what is received lands in its place without another copy.
        span = whole[part.start : part.end]
        if part.rank == rank:
            span.copy_(mine)
        else:
            coming.append(dist.P2POp(dist.irecv, span, group=state.group, group_peer=part.rank))
    _exchange(coming)
    return whole


def _exchange(messages: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(messages):
        work.wait()


def names_to_load(states: Sequence[ParamState]) -> list[str]:
    """Tensors of the state to load one after the other; the same on all ranks of a model."""
    halves = any(state.param.dtype != torch.float32 for state in states)
    return ["param", *MOMENTS] if halves else list(MOMENTS)


def to_load(states: Sequence[ParamState], entries: dict[int, Any], name: str) -> dict[str, Any]:
    """Sharded tensors of `name` that hold this rank's parts."""
    held = [(number, state) for number, state in enumerate(states) if name in state.tensors]
    return {
        str(number): _sharded(
            entry := entries[id(state.param)],
            name,
            # The complete parameter, since a part may begin and end inside a row. On the host:
            # only the part goes to the device.
            torch.zeros(state.param.numel(), dtype=state.tensors[name].dtype),
            entry.replica_id,
        )
        for number, state in held
    }


@torch.no_grad()
def take(states: Sequence[ParamState], name: str, loaded: dict[str, Tensor]) -> None:
    """Put loaded tensors where the optimizer has them."""
    for number, whole in loaded.items():
        state = states[int(number)]
        part = state.local()
        # `to_load` asked only for parameters of which this rank has a part.
        assert part is not None
        state.tensors[name].copy_(whole.flatten()[part.start : part.end])
