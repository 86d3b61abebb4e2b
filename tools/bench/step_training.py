"""Forward passes and updates, ours and transformers', beside what the machine reaches.

Invariant: all of them compute in one process, with as many threads, one after the other; both
models get the same rows in as large micro-batches, ours as a run cuts them, transformers' padded on
the right; and before anything is timed their log-probs have to agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import step_rates
import torch
from step_job import PLATFORM, lengths_of, make_rows, read_job, read_prompts
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf3d.batching.dispatch import for_update, split_forward, split_update
from rlhf3d.batching.packed import pack, put_in_rows
from rlhf3d.config.derived import micro_batching_of
from rlhf3d.placement.train_group import FORWARD_COLUMNS, sequence_cost
from rlhf3d.placement.worker import TrainWorker, worker_setup
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.trainer.assembly import policy_objective

AGREE = {"bfloat16": 0.2, "float32": 1e-3}
"""Largest mean difference of the two models' log-probs, nats: that of unlikely tokens, which random
ones are, is rounded most."""
TOTAL_STEPS = 1000
"""Of the schedule of the learning rate."""


@dataclass(frozen=True)
class Settings:
    """What a process of this file is started with."""

    job: Path
    overrides: tuple[str, ...]
    threads: int
    prompts: int
    completions: int


class Training:
    """A training rank as a run has it, without Ray, and transformers' model beside it."""

    def __init__(self, settings: Settings) -> None:
        self._read = read_job(settings.job, settings.overrides)
        config, derived, spec = self._read
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        setup = worker_setup(config, derived.groups[0], PLATFORM, TOTAL_STEPS)
        self._worker = TrainWorker(setup, 0)
        self._worker.build(*self._worker.rendezvous(), settings.threads)
        self._objective = policy_objective(config.actor, {})
        self._cost = sequence_cost(spec)
        prompts = read_prompts(config, settings.prompts)
        self._batch = make_rows(self._read, prompts, settings.completions)
        self._lengths = lengths_of(self._batch, settings.prompts, settings.completions)
        rule, batch = micro_batching_of(config, "actor"), self._batch.only(FORWARD_COLUMNS)
        (self._share,) = split_forward(batch, rule, derived.layout, self._cost)
        # Padded rows of similar length, which suit transformers best.
        padded = replace(rule, packed=False, share_prefixes=False)
        (self._their_share,) = split_forward(batch, padded, derived.layout, self._cost)
        self._optimizer_s = 0.0

    def compare(self) -> dict[str, Any]:
        """Load transformers' model and warm all up; what the rows are, and how far both differ."""
        from transformers import AutoModelForCausalLM

        model = self._read.config.model
        self._theirs = AutoModelForCausalLM.from_pretrained(model.path, dtype=self._dtype)
        count, tokens = len(self._share.micro_batches), sum(self._batch.lengths())
        responses = int(self._batch["response_lengths"].sum())
        self._products = step_rates.model_products(
            self._read.spec, self._share.positions // count, responses // count, self._dtype
        )
        self._time_optimizer()
        own, theirs = self._own_logprobs(), self._their_logprobs()
        self._batch = self._batch.with_columns(old_logprobs=own, ref_logprobs=own)
        mask = self._batch["response_mask"]
        apart = float(((own - theirs).abs() * mask).sum() / mask.sum())
        assert apart <= AGREE[model.dtype], f"log-probs differ by {apart:.3g} nats on average"
        self._own_update()
        self._their_passes()
        self.rates()
        return {"apart": apart, "lengths": self._lengths, "tokens": tokens}

    def rates(self) -> dict[str, float]:
        """See `step_rates.measure`."""
        return step_rates.measure(self._products, self._dtype)

    def forward(self) -> float:
        """Log-probs of the responses; seconds."""
        return _seconds(self._own_logprobs)

    def their_forward(self) -> float:
        """The same by transformers, its vocabulary head over all tokens."""
        return _seconds(self._their_logprobs)

    def update(self) -> tuple[float, float]:
        """One optimizer step; seconds, and those of the optimizer alone."""
        self._optimizer_s = 0.0
        return _seconds(self._own_update), self._optimizer_s

    def their_update(self) -> float:
        """Forward and backward by transformers, without an optimizer's step."""
        return _seconds(self._their_passes)

    def create_stream(self, setup: SyncSetup) -> None:
        """Make this rank's end of a weight stream."""
        self._worker.create_stream(setup)

    def open_stream(self, name: str) -> None:
        """And open it, after the engine made its own."""
        self._worker.open_stream(name, None)

    def send(self, name: str, sync: int) -> None:
        """Send the actor's weights."""
        self._worker.send_weights(name, sync, sync)

    def close_stream(self, name: str) -> None:
        """Remove what this rank has of it."""
        self._worker.close_stream(name)

    def _own_logprobs(self) -> Tensor:
        batch, share = self._batch.only(FORWARD_COLUMNS), self._share
        found = self._worker.forward(
            "old_logprobs", "actor", pack(batch, share.rows), share.micro_batches
        )
        assert found is not None, "one process is the last stage"
        logprobs = torch.zeros_like(batch["response_mask"])
        put_in_rows(logprobs, share.rows, batch["response_lengths"], found["logprobs"])
        return logprobs

    def _own_update(self) -> None:
        config, derived, _ = self._read
        longest, batch = config.data.max_response_length, for_update(self._batch)
        (share,) = split_update(batch, derived.actor, derived.layout, longest, self._cost)
        rows = pack(batch, share.rows)
        self._worker.update("actor", rows, share.mini_batches, self._objective)

    @torch.no_grad()
    def _their_logprobs(self) -> Tensor:
        self._theirs.eval()
        logprobs = torch.zeros_like(self._batch["response_mask"])
        for numbers in self._their_share.micro_batches:
            rows = [self._their_share.rows[number] for number in numbers]
            logprobs[rows] = self._their_responses(rows)
        return logprobs

    def _their_passes(self) -> None:
        self._theirs.train()
        self._theirs.zero_grad(set_to_none=True)
        for numbers in self._their_share.micro_batches:
            rows = [self._their_share.rows[number] for number in numbers]
            loss = -(self._their_responses(rows) * self._batch["advantages"][rows]).mean()
            loss.backward()

    def _their_responses(self, rows: list[int]) -> Tensor:
        """Log-probs [b, R] of the responses, zero outside of them."""
        lengths = self._batch.lengths()
        ids = self._batch["input_ids"][rows, : max(lengths[row] for row in rows)]
        # No attention mask: padding comes after every real token, so that causality hides it.
        logits = self._theirs(ids, use_cache=False).logits[:, :-1]
        flat, labels = logits.flatten(0, 1).float(), ids[:, 1:].flatten()
        logprobs = -cross_entropy(flat, labels, reduction="none").view(len(rows), -1)
        # The state before a token predicts it.
        mask = self._batch["response_mask"][rows]
        places = self._batch["prompt_lengths"][rows, None] - 1 + torch.arange(mask.shape[1])
        return logprobs.gather(1, places.clamp_max(logprobs.shape[1] - 1)) * mask

    def _time_optimizer(self) -> None:
        optimizer = self._worker.engines["actor"].optimizer
        step = optimizer.step

        def timed() -> Any:
            start = time.perf_counter()
            result = step()
            self._optimizer_s += time.perf_counter() - start
            return result

        optimizer.step = timed


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
