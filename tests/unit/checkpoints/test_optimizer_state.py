"""Parameters of which several ranks hold parts are put together in the communicator that their
group has.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from rlhf3d.checkpoints.optimizer_state import ParamState, Part, collect
from rlhf3d.parallel import nccl_rules

VALUES = torch.arange(10.0)


def collect_parts(rank: int, port: int, backend: str) -> tuple[list[float] | None, set[str]]:
    """What a rank gets of a parameter in three parts, one of them in the last place.

    Communicators of messages.
    """
    nccl_rules.register()
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    group = dist.group.WORLD
    parts = (Part(0, 0, 2), Part(1, 2, 7), Part(3, 7, 10))
    own = {part.rank: {"exp_avg": VALUES[part.start : part.end].clone()} for part in parts}
    state = ParamState(torch.nn.Parameter(torch.zeros(2, 5)), parts, group, own.get(rank, {}))
    whole = collect(state, "exp_avg")
    dist.barrier()
    return None if whole is None else whole.tolist(), getattr(group, "communicators", set())


@pytest.mark.parametrize("backend", ["gloo", nccl_rules.NAME])
def test_the_owner_gets_all_parts(backend: str) -> None:
    results = run_ranks(4, collect_parts, backend)
    assert [whole for whole, _ in results] == [None, VALUES.tolist(), None, None]
    assert set.union(*(opened for _, opened in results)) <= {"all"}
