"""vLLM's scheduler between two engine steps: what vLLM has no call of its own for.

Invariant: no request is lost, and none is worked on that should wait. Each function first checks
that vLLM still is what it takes it to be.
Runs in: engine rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def finish_steps_under_way(llm: Any) -> list[Any]:
    """End the steps that vLLM has begun, without beginning another; the outputs that finish.

    On GPUs it begins a step before it reads the tokens of the one before. A preempted request loses
    the token of such a step, for which its generator has drawn already.
    """
    core = _core(llm)
    if not core.batch_queue:
        return []
    from vllm.v1.core.sched.interface import PauseState

    scheduler, outputs = core.scheduler, []
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    try:
        while core.batch_queue:
            outputs += [output for output in llm.llm_engine.step() if output.finished]
    finally:
        scheduler.set_pause_state(PauseState.UNPAUSED)
    return outputs


@contextmanager
def holding_back(llm: Any) -> Iterator[None]:
    """Keep requests that wait out of the steps in the block, which are for those that come in it.

    None may be running, and those that come must be done by the end.
    """
    from vllm.v1.core.sched.request_queue import create_request_queue

    scheduler = _core(llm).scheduler
    assert not scheduler.running, "requests are running"
    held, scheduler.waiting = scheduler.waiting, create_request_queue(scheduler.policy)
    try:
        yield
        assert not scheduler.running and not scheduler.waiting, "requests came and are not done"
    finally:
        scheduler.waiting = held


def requests_of(llm: Any) -> tuple[list[Any], int]:
    """vLLM's requests that run, and how many wait."""
    scheduler = _core(llm).scheduler
    return list(scheduler.running), len(scheduler.waiting)


def _core(llm: Any) -> Any:
    """vLLM's engine core, which is in this process."""
    core = llm.llm_engine.engine_core.engine_core
    assert hasattr(core, "batch_queue") and not core.scheduler.kv_holding_waiting, (
        "vLLM's engine core queues steps or requests in another way"
    )
    return core
