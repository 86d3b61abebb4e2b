"""vLLM as our engine runs it, and raw, each in a process of its own.

Invariant: both are started with the same arguments, environment and threads, serve the model
folder's weights, and get the same prompts, seeds and sampling settings, each time with an empty
prefix cache.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_job import PLATFORM, read_job, read_prompts

from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import POLL_S, Request, SamplingSettings, Stops
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_engine import VLLMEngine
from rlhf3d.rollout.vllm_requests import sampling_params
from rlhf3d.rollout.vllm_start import kernel_arguments, llm_arguments, set_environment
from rlhf3d.tokenizer.end_tokens import end_tokens
from rlhf3d.tokenizer.load import load_tokenizer


@dataclass(frozen=True)
class Settings:
    """What a process of this file is started with."""

    job: Path
    overrides: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Written:
    """One batch of completions."""

    seconds: float
    tokens: int
    longest: int
    """Tokens of the longest completion."""
    digest: str
    """Of the tokens."""


class _Generator:
    """What both sides share: settings and requests."""

    def __init__(self, settings: Settings) -> None:
        config, derived, spec = read_job(settings.job, settings.overrides)
        folder, rollout = config.model.path, config.rollout
        tokenizer = load_tokenizer(folder, config.model.chat_template)
        ends = end_tokens(folder, tokenizer, spec.vocab_size, rollout.stop_token_ids)
        self.engine = VLLMEngine(
            EngineSettings(
                os.path.abspath(folder),
                rollout,
                derived.max_sequence_length,
                PLATFORM,
                stops=Stops(ends.ids, rollout.stop),
                load_weights=True,
            ),
            threads=settings.threads,
        )
        self.settings, self._prompts = (
            self.engine._settings,
            read_prompts(config, config.data.train_batch_size),
        )
        self._n = rollout.n
        self._sampling = SamplingSettings(
            rollout.temperature, rollout.top_p, rollout.top_k, config.data.max_response_length
        )

    def requests(self, seed: int) -> dict[int, Request]:
        """Each prompt's completions, numbered."""
        made: dict[int, Request] = {}
        for prompt in self._prompts:
            for _ in range(self._n):
                number = len(made)
                made[number] = Request(prompt, 1000 * seed + number, self._sampling)
        return made


class Ours(_Generator):
    """Our engine."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.engine.start()

    def generate(self, seed: int) -> Written:
        """Submit all, and take completions as they come."""
        requests, written = self.requests(seed), {}
        self.engine._llm.reset_prefix_cache()
        start = time.perf_counter()
        self.engine.submit(requests)
        while len(written) < len(requests):
            written |= self.engine.poll(POLL_S)
        seconds = time.perf_counter() - start
        return _written(seconds, {number: one.token_ids for number, one in written.items()})

    def open_weights(self, setup: SyncSetup) -> None:
        """Open this engine's end of a weight stream, and make weights to pack."""
        self.engine.open_weights(setup, 0, None)
        dtype = getattr(torch, setup.dtype)
        self._weights = {
            # Not zeros, whose memory would be one page until something is written.
            param.name: torch.full(param.shape, 0.01, dtype=dtype)
            for param in setup.table(setup.destination_of(0, 0))
        }

    def pack(self) -> float:
        """Put weights that lie here already into vLLM's layers; seconds. `update` comes next."""
        (seconds,) = self.engine._llm.collective_rpc(_pack, args=(self._weights,))
        return float(seconds)

    def update(self, sync: int) -> dict[str, float]:
        """A complete update of the engine; its parts in seconds."""
        start = time.perf_counter()
        report = self.engine.update_weights(sync, sync)
        self.engine.publish(sync)
        total = time.perf_counter() - start
        return {
            "total": total,
            "wait": report.wait_s,
            "verify": report.verify_s,
            "load": report.load_s,
        }

    def close(self) -> None:
        """Shut it down."""
        self.engine.close()


class Raw(_Generator):
    """vLLM's own `LLM`, as a user without this project calls it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        set_environment(self.settings, settings.threads)
        torch.set_num_threads(settings.threads)
        from torch._dynamo import config as dynamo
        from vllm import LLM

        dynamo.disable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
        arguments = llm_arguments(self.settings)
        del arguments["worker_extension_cls"]
        arguments |= kernel_arguments(self.settings)
        self._llm = LLM(self.settings.model_path, **arguments)

    def generate(self, seed: int) -> Written:
        """One call with all prompts."""
        requests = self.requests(seed)
        self._llm.reset_prefix_cache()
        start = time.perf_counter()
        inputs = [{"prompt_token_ids": list(one.prompt_ids)} for one in requests.values()]
        params = [sampling_params(one, self.settings.stops) for one in requests.values()]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return _written(seconds, dict(enumerate(out.outputs[0].token_ids for out in outputs)))


def _written(seconds: float, tokens: Mapping[int, Iterable[int]]) -> Written:
    lists = [list(tokens[number]) for number in sorted(tokens)]
    digest = hashlib.sha256(repr(lists).encode()).hexdigest()[:16]
    counts = [len(tokens) for tokens in lists]
    return Written(seconds, sum(counts), max(counts), digest)


def _pack(worker: Any, weights: Mapping[str, Any]) -> float:
    """Runs in vLLM's worker: what an update does once a weight is here."""
    from vllm.config import set_current_vllm_config

    writer, start = worker._weight_writer, time.perf_counter()
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        for name, weight in weights.items():
            live = writer.in_place(name)
            if live is None:
                writer.load_packed(name, weight)
            else:
                live.copy_(weight)
        writer.finish()
    return time.perf_counter() - start
