"""A real vLLM engine in child processes, fed by the weight stream of four pretended training ranks.

Every engine rank lives in a child process (vLLM patches torch and the environment), one after the
other, in the loop that steps it.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from support.tiny_models import make_tiny_model
from support.weights import rank_params
from transformers import AutoModelForCausalLM

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.models.spec import load_spec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.meeting import open_meeting
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.resharding.sending import WeightSender
from rlhf3d.resharding.setup import FILE_PREFIX, SyncSetup
from rlhf3d.resharding.sites import Sites
from rlhf3d.rollout.api import (
    NO_STOPS,
    Completion,
    Request,
    SamplingSettings,
    Stops,
    SyncReport,
)
from rlhf3d.rollout.engine_loop import EngineLoop, Progress
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_engine import VLLMEngine

# vLLM on CPU has no attention kernel for a head_dim below 32.
TINY = {"hidden": 64, "heads": 2, "kv_heads": 2, "layers": 2}
PROMPT_TOKENS = 140
"""More than one KV block (128 tokens on CPU), so that the prefix cache has something to keep."""
ENGINE: VLLMEngine | None = None
LOOP: EngineLoop | None = None
WAIT_S = 60.0
START_S = 300.0
"""Of vLLM's import and start."""
RIGS = itertools.count()


def start_engine(
    folder: Path,
    ranks: int = 1,
    stops: Stops = NO_STOPS,
    rank: int = 0,
    meeting: tuple[str, int] | None = None,
    update: Literal["between_batches", "in_flight"] = "between_batches",
) -> None:
    """In the child: replace its engine."""
    global ENGINE, LOOP
    close_engine()
    rollout = RolloutConfig(
        dtype="float32",
        tensor_parallel_size=ranks,
        max_num_seqs=8,
        kv_cache_gib=0.05,
        enforce_eager=True,
        update=update,
    )
    settings = EngineSettings(str(folder), rollout, 256, CPUPlatform("test"), stops=stops)
    ENGINE = VLLMEngine(settings, rank=rank)
    start = partial(ENGINE.start, meeting)
    LOOP = EngineLoop(start, rank=rank, name=f"rank {rank}", timeout_s=WAIT_S)
    LOOP.wait_started(START_S)


def close_engine() -> list[str]:
    """In the child: close its engine, if that is not done; what engines have in /dev/shm."""
    if ENGINE is not None:
        ENGINE.close()
        ENGINE.close()
    named = re.compile(rf"{FILE_PREFIX}test-{os.getppid()}-|\d+-tp:.*cpushm")
    return [name for name in os.listdir("/dev/shm") if named.match(name)]


def call(number: int, method: str, *args: Any) -> Any:
    """In the child: a command for its engine; what it returns."""
    assert LOOP is not None
    return LOOP.call(number, method, *args)


def poll(after: int, timeout_s: float = WAIT_S) -> Progress:
    """In the child: see `EngineLoop.poll`."""
    assert LOOP is not None
    return LOOP.poll(after, timeout_s)


def policy_version() -> int | None:
    """In the child: what its engine serves."""
    assert ENGINE is not None
    return ENGINE.policy_version


def norm_kernels() -> list[list[str]]:
    """In the child: who computes the norms of vLLM, the first choice first."""
    from vllm import ir

    return [ir.ops.rms_norm.get_priority(), ir.ops.fused_add_rms_norm.get_priority()]


def resident_mib() -> float:
    """In the child: memory of its process."""
    return psutil.Process().memory_info().rss / 2**20


def break_prefix_reset() -> None:
    """In the child: vLLM says that it dropped its prefix cache, and does not."""
    assert ENGINE is not None
    ENGINE._llm.reset_prefix_cache = lambda **_: True


def slow_down(step_s: float) -> None:
    """In the child: a step takes longer, so that much happens while requests run."""
    assert ENGINE is not None
    step = type(ENGINE)._step

    def slow(engine: VLLMEngine) -> list[Any]:
        time.sleep(step_s)
        return step(engine)

    ENGINE._step = partial(slow, ENGINE)  # type: ignore[method-assign]


def begin_steps_ahead(ahead: bool) -> None:
    """In the child: vLLM begins a step before it reads the tokens of the one before, as on GPUs."""
    assert ENGINE is not None
    core = ENGINE._llm.llm_engine.engine_core.engine_core
    core.batch_queue_size = 2
    core.batch_queue = deque(maxlen=2) if ahead else None
    core.step_fn = core.step_with_batch_queue if ahead else core.step


def wait_all(calls: list[Future]) -> list[Any]:
    return [future.result() for future in calls]


class Rig:
    """A model cut for four training ranks, their ends of the stream, an engine in the child."""

    layout = ParallelLayout(tp=2, pp=2)

    def __init__(
        self,
        children: list[ProcessPoolExecutor],
        folder: Path,
        stops: Stops = NO_STOPS,
        update: Literal["between_batches", "in_flight"] = "between_batches",
        **model: Any,
    ) -> None:
        """An engine of as many tensor-parallel ranks as there are children."""
        self.children, self.version, self.syncs = children, 0, 0
        self.applied: dict[int, int] = {}
        """Engine steps before each command that the engine told of."""
        self.made: dict[int, Completion] = {}
        """What it told of and nobody has taken."""
        self.commands = itertools.count(1)
        self.last_command = 0
        make_tiny_model(folder, **TINY | model)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.setup = SyncSetup(
            name=f"test-{os.getpid()}-{next(RIGS)}",
            spec=load_spec(folder),
            layout=self.layout,
            style="local",
            sites=Sites.hosts([0] * 4),
            dtype="float32",
            bucket_bytes=40_000,
            timeout_s=20.0,
            tensor_parallel_size=len(children),
        )
        self.params: list[dict[tuple[int, str], torch.Tensor]] = [{} for _ in range(4)]
        self.cut()
        self.senders = [
            WeightSender(self.setup, rank, params) for rank, params in enumerate(self.params)
        ]
        meeting = ("127.0.0.1", children[0].submit(open_meeting).result(START_S))
        wait_all(
            [
                child.submit(start_engine, folder, len(children), stops, rank, meeting, update)
                for rank, child in enumerate(children)
            ]
        )
        for sender in self.senders:
            sender.open()
        self.call("open_weights", self.setup, 0, None)
        for sender in self.senders:
            sender.seal()

    def call(self, method: str, *args: Any) -> Any:
        """The same command on every rank of the engine; what the first returns."""
        return wait_all(self.start(method, *args))[0]

    def start(self, method: str, *args: Any) -> list[Future]:
        """Start a command on every rank, the last one first."""
        self.last_command = next(self.commands)
        calls = [
            child.submit(call, self.last_command, method, *args)
            for child in reversed(self.children)
        ]
        return calls[::-1]

    def cut(self) -> None:
        """The model's weights as the training ranks hold them."""
        for rank, params in enumerate(self.params):
            params.update(rank_params(self.model.state_dict(), self.setup.spec, self.layout, rank))

    def perturb(self) -> None:
        """Change every weight: stale parts of the engine would show."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        self.version += 1
        self.cut()

    def load(self) -> SyncReport:
        """Send the weights and have the engine load them, without publishing."""
        loading = self.start("update_weights", self.version, self.syncs)
        with ThreadPoolExecutor(len(self.senders)) as threads:
            sending = [
                threads.submit(sender.send, self.version, self.syncs) for sender in self.senders
            ]
        self.syncs += 1
        report = wait_all(loading)[0]
        assert all(work.result().sent_bytes for work in sending)
        return report

    def sync(self) -> SyncReport:
        self.perturb()
        report = self.load()
        self.call("publish", self.version)
        return report

    def requests(self, count: int = 3, **sampling: Any) -> list[Request]:
        """They share their first 139 tokens."""
        settings = SamplingSettings(**{"max_tokens": 8} | sampling)
        generator = torch.Generator().manual_seed(7)
        prompt = torch.randint(4, 128, (PROMPT_TOKENS,), generator=generator).tolist()
        return [Request((*prompt[:-1], 10 + i), 100 + i, settings) for i in range(count)]

    def generate(self, count: int = 3, **sampling: Any) -> list[tuple[Request, Completion]]:
        requests = self.requests(count, **sampling)
        self.call("submit", dict(enumerate(requests)))
        made = self.completions()
        assert len(made) == count
        return [(request, made[number]) for number, request in enumerate(requests)]

    def completions(self) -> dict[int, Completion]:
        """All that the engine still makes; every rank takes the same steps for it."""
        while True:
            told = self.ask(WAIT_S)
            if all(progress.idle for progress in told):
                assert len({progress.steps for progress in told}) == 1
                made, self.made = self.made, {}
                return made

    def take_steps(self, count: int) -> None:
        """Wait until the engine has taken so many more."""
        told = self.ask(0)
        upto = told[0].steps + count
        while told[0].steps < upto:
            assert not told[0].idle, "all requests have ended before that"
            told = self.ask(0.05)

    def ask(self, timeout_s: float) -> list[Progress]:
        """What the ranks have done; keeps the completions."""
        asked = [child.submit(poll, self.last_command, timeout_s) for child in self.children]
        told = wait_all(asked)
        self.made |= told[0].completions
        self.applied |= dict(told[0].applied)
        return told

    def slow_down(self, step_s: float) -> None:
        wait_all([child.submit(slow_down, step_s) for child in self.children])

    def expected(self, tokens: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
        """log p of tokens 1, 2, ... by transformers."""
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        return torch.log_softmax(logits / temperature, -1).gather(
            1, torch.tensor(tokens)[1:, None]
        )[:, 0]

    def check(self, temperature: float = 1.0, greedy: bool = False) -> None:
        """Sampled and scored log-probs are transformers' on the current weights."""
        pairs = self.generate(temperature=temperature, greedy=greedy)
        texts = [(*request.prompt_ids, *completion.token_ids) for request, completion in pairs]
        scores = self.call("score", texts, temperature)
        for tokens, (_, completion), scored in zip(texts, pairs, scores, strict=True):
            expected = self.expected(tokens, temperature)
            assert completion.versions == ((0, self.version),)
            torch.testing.assert_close(torch.tensor(scored), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), expected[PROMPT_TOKENS - 1 :], atol=1e-4, rtol=0
            )
