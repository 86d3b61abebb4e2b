"""What a step of vLLM is told to be."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf3d.observability.profile.recorder import start_recording, take_record
from rlhf3d.rollout.api import Request, SamplingSettings
from rlhf3d.rollout.step_spans import StepSpans


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    yield
    take_record()


def vllm() -> Any:
    """vLLM as far as it is looked at."""
    scheduler = SimpleNamespace(running=[], waiting=[], kv_holding_waiting=[])
    core = SimpleNamespace(batch_queue=None, scheduler=scheduler)
    return SimpleNamespace(
        llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))
    )


def running(name: str, prompt: int, tokens: int) -> Any:
    return SimpleNamespace(
        request_id=f"{name}-abcd", num_prompt_tokens=prompt, num_output_tokens=tokens
    )


def finished(name: str, prompt: int, tokens: int) -> Any:
    output = SimpleNamespace(token_ids=[0] * tokens)
    return SimpleNamespace(request_id=name, prompt_token_ids=[0] * prompt, outputs=[output])


def test_steps_and_requests() -> None:
    start_recording()
    llm, spans = vllm(), StepSpans()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    sampling = SamplingSettings(1.0, 1.0, -1, 8)
    spans.submitted({10: Request([1, 2, 3], sampling, 0), 11: Request([1, 2], sampling, 0)})
    numbers = {"0": 10, "1": 11}

    scheduler.waiting = [1, 2]
    spans.before(llm)
    scheduler.running, scheduler.waiting = [running("0", 3, 1), running("1", 2, 1)], []
    spans.after(llm, [], numbers)

    spans.before(llm)
    scheduler.running = [running("0", 3, 2)]
    spans.after(llm, [finished("1", 2, 2)], numbers)
    spans.aborted([10])

    record = take_record()
    assert record is not None
    assert [(one.kind, dict(one.details)) for one in record.spans] == [
        ("prefill", {"running": 2, "waiting": 2, "prefills": 2, "prompt_tokens": 5}),
        ("decode", {"running": 2, "waiting": 0}),
    ]
    first, second = record.requests
    assert (first.number, first.tokens, first.aborted) == (10, 2, True)
    assert (second.number, second.tokens, second.aborted) == (11, 2, False)
    for one in record.requests:
        assert one.first_token is not None and one.ended is not None
        assert one.submitted <= one.first_token <= one.ended


def test_nothing_is_looked_at_without_a_profile() -> None:
    spans = StepSpans()
    spans.submitted({})
    spans.before(None)
    spans.after(None, [], {})
    spans.aborted([1])
    assert take_record() is None
