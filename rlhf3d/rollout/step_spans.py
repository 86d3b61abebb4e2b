"""What an engine's steps did, and where its requests are, told to this process's recorder.

Invariant: only looks, before and after a step of vLLM; does nothing while no step is profiled.
Runs in: engine rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf3d.observability.profile.operations import Operations
from rlhf3d.observability.profile.recorder import Recorder, recorder
from rlhf3d.observability.profile.spans import Kind
from rlhf3d.rollout.api import Request
from rlhf3d.rollout.vllm_scheduler import requests_of


@dataclass(frozen=True)
class _Step:
    """Before it."""

    recorder: Recorder
    began: Any
    tokens: Mapping[str, int]
    """Of requests that run."""
    waiting: int


@dataclass(frozen=True)
class _Seen:
    """A request after the step."""

    prompt_tokens: int
    tokens: int
    before: int
    """Tokens that it had before; 0 for one that did not run."""
    finished: bool


class StepSpans:
    """Of one engine rank."""

    def __init__(self) -> None:
        self._step: _Step | None = None
        self._traces: Operations | None = None
        """Kept beyond the profile, as this thread has to end them."""

    def submitted(self, requests: Mapping[int, Request]) -> None:
        """These came, by our numbers."""
        if (found := recorder()) is not None:
            for number, request in requests.items():
                found.submitted(number, len(request.prompt_ids))

    def aborted(self, numbers: Iterable[int]) -> None:
        """These are not wanted any more."""
        found = recorder()
        for number in numbers:
            if found is not None:
                found.ended(number, aborted=True)

    def before(self, llm: Any) -> None:
        """A step begins."""
        self._step = None
        if (found := recorder()) is not None:
            if found.operations is not None:
                self._traces = found.operations
                found.operations.begin("generate")
            running, waiting = requests_of(llm)
            tokens = {_name(request): request.num_output_tokens for request in running}
            self._step = _Step(found, found.clock.stamp(), tokens, waiting)

    def after(self, llm: Any, outputs: Sequence[Any], numbers: Mapping[str, int]) -> None:
        """It is done; `outputs`: of requests that are finished; `numbers`: ours, by name."""
        if self._step is not None:
            _note(self._step, llm, outputs, numbers)
        if self._traces is not None and len(outputs) < len(numbers):
            self._traces.look()
        elif self._traces is not None:  # perhaps no step comes any more
            self._traces.end()


def _note(step: _Step, llm: Any, outputs: Sequence[Any], numbers: Mapping[str, int]) -> None:
    recorder, now = step.recorder, step.recorder.clock.stamp()
    seen = _seen(step, llm, outputs)
    new = [one for one in seen.values() if not one.before]
    kind: Kind = "prefill" if new else "decode"
    details = {"running": len(seen), "waiting": step.waiting}
    if new:
        prompt_tokens = sum(one.prompt_tokens for one in new)
        details |= {"prefills": len(new), "prompt_tokens": prompt_tokens}
    recorder.spans.append((kind, kind, step.began, now, details))
    for name, one in seen.items():
        if (number := numbers.get(name)) is not None:
            recorder.seen(number, one.prompt_tokens, one.tokens, one.before)
            if one.finished:
                recorder.ended(number)


def _seen(step: _Step, llm: Any, outputs: Sequence[Any]) -> dict[str, _Seen]:
    """Requests that run, and those that are finished, by name."""
    found = {}
    for request in requests_of(llm)[0]:
        name = _name(request)
        sizes = (request.num_prompt_tokens, request.num_output_tokens)
        found[name] = _Seen(*sizes, step.tokens.get(name, 0), finished=False)
    for output in outputs:
        name, tokens = output.request_id, len(output.outputs[0].token_ids)
        before = step.tokens.get(name, 0)
        found[name] = _Seen(len(output.prompt_token_ids), tokens, before, finished=True)
    return found


def _name(request: Any) -> str:
    """What we call a request of vLLM's, to whose name it adds letters of its own."""
    return str(request.request_id).partition("-")[0]
