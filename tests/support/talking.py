"""Engines and environments that say what a test tells them to, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from support.tiny_models import make_tiny_tokenizer

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.fields import Overlong
from rlhf3d.data.dataset import Prompt
from rlhf3d.environments.api import Call, Reply, Reset, Step
from rlhf3d.experience.environment_runner import EnvironmentRunner
from rlhf3d.experience.episode import Rules
from rlhf3d.pool.process import CallResult, Ending
from rlhf3d.rollout.api import Completion, Request, written_by
from rlhf3d.tokenizer.chat import tokenize
from rlhf3d.tokenizer.turns import Turns

TOKENIZER = make_tiny_tokenizer()
TURNS = Turns(TOKENIZER)
END = TOKENIZER.eos_token_id


def asked(index: int, text: str = "go") -> Prompt:
    """A prompt as the data set makes it; bytes are its tokens."""
    messages = [{"role": "user", "content": text}]
    ids = tokenize(TOKENIZER, messages)
    columns = {"prompt": messages, "index": index}
    return Prompt(ids, "test", str(index), {}, index, text, messages, columns=columns)


def rules(
    max_prompt_length: int = 64, overlong_prompts: Overlong = "error", **config: Any
) -> Rules:
    """Rules of an environment that some file would hold."""
    settings = EnvironmentConfig(path="environment.py", **config)
    return Rules(settings, max_prompt_length, overlong_prompts, TOKENIZER, TURNS)


def said(text: str, ended: bool = True, version: int = 1) -> Completion:
    """A turn of the model."""
    ids = (*TOKENIZER.encode(text, add_special_tokens=False), *([END] if ended else []))
    reason = "stop" if ended else "length"
    return Completion(ids, (-0.5,) * len(ids), reason, written_by(version))  # type: ignore[arg-type]


class Echo:
    """Answers each turn with `again TEXT`; the turn `end` is the last, and worth 1."""

    def __call__(self, call: Call) -> Reply:
        if isinstance(call, Reset):
            return Reply(prompt=tuple(call.row["prompt"]))
        if not isinstance(call, Step):
            return Reply(done=True, record={"finished": True})
        if call.text == "end":
            return Reply(reward=1.0, done=True, record={"last": call.text})
        answer = {"role": "user", "content": f"again {call.text}"}
        return Reply((answer,), reward=0.25, record={"last": call.text})


class FakeSessions:
    """Environments in this process, which reply at once; `make` gives each its own.

    A `CallResult` that one returns is how its call ended.
    """

    def __init__(self, make: Callable[[], Callable[[Call], Reply | CallResult]] = Echo) -> None:
        self.make = make
        self.sessions: list[FakeSession] = []

    def session(self) -> FakeSession:
        self.sessions.append(FakeSession(self.make()))
        return self.sessions[-1]

    @property
    def alive(self) -> int:
        return sum(not session.closed for session in self.sessions)


class FakeSession:
    def __init__(self, environment: Callable[[Call], Reply | CallResult]) -> None:
        self.environment = environment
        self.calls: list[Call] = []
        self.closed = False

    def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
        assert not self.closed
        self.calls.append(payload)
        reply = self.environment(payload)
        future: Future[CallResult] = Future()
        future.set_result(
            reply if isinstance(reply, CallResult) else CallResult(Ending.VALUE, reply)
        )
        return future

    def close(self) -> None:
        self.closed = True


def failed(message: str = "it fell over") -> CallResult:
    return CallResult(Ending.ERROR, message=message)


def runner(sessions: FakeSessions, **config: Any) -> EnvironmentRunner:
    """A runner whose environments reply at once."""
    return EnvironmentRunner(sessions, rules(**config))


class TalkingEngine:
    """Says of each trajectory what its script says, turn by turn; the last script for the rest.

    Answers the last request first, one a poll.
    """

    def __init__(self, *scripts: Sequence[str | Completion]) -> None:
        self.scripts = scripts
        self.submitted: list[dict[int, Request]] = []
        """Every call of `submit`."""
        self._waiting: dict[int, Request] = {}
        self._turns: dict[int, int] = {}

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Mapping[int, Request]) -> None:
        assert not self._waiting.keys() & requests.keys()
        self.submitted.append(dict(requests))
        self._waiting |= requests

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        if not self._waiting:
            return {}
        number, _ = self._waiting.popitem()
        script = self.scripts[min(number, len(self.scripts) - 1)]
        turn = self._turns.get(number, 0)
        self._turns[number] = turn + 1
        words = script[turn % len(script)]
        return {number: said(words) if isinstance(words, str) else words}

    def abort(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self._waiting.pop(number, None)
