"""Engine and trainer of a configuration, started once to compare log-probs of the same tokens.

Invariant: weights, answers and log-probs come from the run's own parts and phases; nothing is
trained or scored, and every process is gone at the end.
Runs in: driver.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf3d.checkpoints.store import CONFIG_FILE
from rlhf3d.config.derived import Derived, derive
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config
from rlhf3d.experience.requests import Requests, TrajectoryRequest
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.tokens import TokenRecorder
from rlhf3d.experience.trajectory import Row
from rlhf3d.observability.console import Console
from rlhf3d.observability.live.waits import waited
from rlhf3d.observability.logs import quiet_libraries, setup_logging
from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.mismatch.causes import Settings
from rlhf3d.observability.mismatch.pairs import Pairs, pairs_of
from rlhf3d.observability.mismatch.trial import Kind, Variation
from rlhf3d.parallel.platform import choose_platform
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rollout.api import SamplingSettings
from rlhf3d.rollout.desk import Desks
from rlhf3d.trainer.assembly import Assembly
from rlhf3d.trainer.inputs import RunInputs, read_inputs
from rlhf3d.trainer.preemption import PreemptionHandler
from rlhf3d.trainer.step_log import StepLog

READ_TOKENS = 8192
"""Tokens that an engine reads again: log-probs of all of a prompt take memory."""
SEED_STEP = 0
"""The step that the requests' seeds are of: no step of training."""


def compare(
    config: Config,
    settings: Settings,
    folder: Path,
    answers: int,
    preemption: PreemptionHandler,
    only: bool = False,
) -> list[Variation]:
    """Start a checked configuration's engines and actor, and compare; `only` as configured.

    `settings`: those of the configuration, by which what is found is judged. Logs and tokens go to
    `folder`. ValueError where a file of the configuration is wrong.
    """
    quiet_libraries()
    platform = choose_platform(config.cluster.platform)
    # What the canary would stop is to be looked at.
    rollout = replace(config.rollout, canary_steps=0, canary_every=0)
    trainer = replace(config.trainer, output_dir=str(folder))
    config = resolve_platform(replace(config, rollout=rollout, trainer=trainer), platform)
    inputs = read_inputs(config)
    derived = _actor_alone(derive(config, len(inputs.train_data)))
    assert derived.total_steps is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config_to_yaml(config), encoding="utf-8")
    setup_logging(folder, "driver")
    with ExitStack() as stack:
        # The findings alone go to standard output.
        console = stack.enter_context(Console(sys.stderr, waited=waited))
        writer = stack.enter_context(MetricsWriter(folder))
        journal = stack.enter_context(JournalWriter(folder))
        recorder = TokenRecorder(inputs.tokenizer, answers)
        log = StepLog(console, writer, derived.total_steps, derived.devices, recorder)
        # Nothing is scored: which tokens are written does not depend on it.
        rewards = RewardManager(None)
        assembly = Assembly.start(
            stack, config, derived, inputs, platform, rewards, log, journal, preemption
        )
        rig = _Rig(assembly, settings)
        found = [rig.as_configured(answers)] if only else list(rig.compare_all(answers))
        assembly.processes.rollout.close()
        return found


def _actor_alone(derived: Derived) -> Derived:
    """Without the models that have no part in it; the trainer computes its log-probs itself."""
    actor = replace(derived.groups[0], roles=("actor",))
    return replace(derived, groups=(actor,), critic=None, old_logprobs_from="phase")


class _Rig:
    """The started parts, and what was written with them."""

    def __init__(self, assembly: Assembly, settings: Settings) -> None:
        self._settings = settings
        self._log, self._inputs = assembly.log, assembly.inputs
        self._rollout = assembly.processes.rollout
        self._weights = assembly.weight_sync()
        desk = Desks(self._weights.engines).open()
        self._collector = assembly.collector(desk, assembly.log.phase)
        self._learner = assembly.learner(self._weights)
        rollout = assembly.config.rollout
        self._seed, self._limit = assembly.config.trainer.seed, assembly.derived.max_sequence_length
        self.sampling = SamplingSettings(
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            assembly.config.data.max_response_length,
        )

    def as_configured(self, count: int) -> Variation:
        """What a first step compares; its tokens are written."""
        written = self._write(_requests(self._inputs, count, self._seed, self.sampling))
        return self._configured(written, self._trained(written))

    def compare_all(self, count: int) -> Iterator[Variation]:
        """That, and with one thing varied at a time."""
        sampling = self.sampling
        requests = _requests(self._inputs, count, self._seed, sampling)
        written = self._write(requests)
        # Engines read before they sleep.
        few = _few(written, self._limit)
        temperature = sampling.temperature
        read = self._read(few, temperature)
        raw = self._read(few, 1.0) if temperature != 1 else []
        trained = self._trained(written)
        yield self._configured(written, trained)
        for number, engine in enumerate(read):
            note = f"engine {number}" if len(read) > 1 else ""
            yield self._variation("read", self._pairs(engine, trained), note)
        yield self._variation("sampled", self._pairs(few, _logprobs(read[0])))
        if raw:
            yield self._variation("raw", self._pairs(few, _logprobs(raw[0])))
        again = self._write(requests)
        pairs = self._pairs(again, self._trained(again))
        yield self._variation("again", pairs, _differing(written, again))
        if sampling.top_p < 1 or sampling.top_k > 0:
            whole = replace(sampling, top_p=1.0, top_k=-1)
            other = self._write([replace(request, sampling=whole) for request in requests])
            yield self._variation("whole", self._pairs(other, self._trained(other)))

    def _variation(self, kind: Kind, pairs: Pairs, note: str = "") -> Variation:
        return Variation(kind, pairs, self._settings, note)

    def _configured(self, written: Experience, trained: Tensor) -> Variation:
        rows = _rows(written)
        tokenizer, total = self._inputs.tokenizer, len(rows)
        prompts = sum(_survives(tokenizer, row.prompt_ids) for row in rows)
        answers = sum(_survives(tokenizer, row.response_ids) for row in rows)
        note = f"decoded and encoded: {prompts} of {total} prompts, {answers} answers are the same"
        return self._variation("configured", self._pairs(written, trained, keep=True), note)

    def _write(self, requests: Sequence[TrajectoryRequest]) -> Experience:
        """Sync the weights, whatever the engines have, and have them answer."""
        self._weights.served_version = None
        self._weights.sync_weights()
        rows = self._collector.collect(requests)
        # Of one whose environment failed nothing may have been written.
        return Experience([one for one in rows if one.trajectory.sampled_length])

    def _trained(self, written: Experience) -> Tensor:
        """[N, R] the trainer's log-probs, as in a step."""
        self._weights.sleep_engines()
        return self._learner.old_logprobs(written.batch(pad_id=0))["old_logprobs"]

    def _read(self, written: Experience, temperature: float) -> list[Experience]:
        """Of each engine: the same tokens with its log-probs when it reads them."""
        rows = _rows(written)
        tokens = [[*row.prompt_ids, *row.response_ids] for row in rows]
        with self._log.phase("engine reads"):
            engines = self._rollout.score(tokens, temperature)
        return [_with_logprobs(written, scores) for scores in engines]

    def _pairs(self, written: Experience, other: Tensor, keep: bool = False) -> Pairs:
        """The log-probs of `written` against `other` [N, R] of the same rows and perhaps more."""
        batch = written.batch(pad_id=0)
        # Rows of those that are left out come after the others.
        other = other[: len(batch["rollout_logprobs"])]
        records = self._log.recorder.records(written, batch.with_columns(old_logprobs=other), 0)
        if keep:
            self._log.writer.tokens(SEED_STEP, records)
        return pairs_of([(SEED_STEP, records)])


def _requests(
    inputs: RunInputs, count: int, seed: int, sampling: SamplingSettings
) -> list[TrajectoryRequest]:
    """One for each of the first `count` prompts of a run."""
    requests = Requests(seed, SEED_STEP)
    found: list[TrajectoryRequest] = []
    while len(found) < count:
        found += requests.draw(inputs.loader.next_batch(), 1, sampling)
    return found[:count]


def _rows(written: Experience) -> list[Row]:
    return list(chain.from_iterable(one.trajectory.rows for one in written.trajectories))


def _survives(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether their text gives the same tokens again, which nothing here depends on."""
    again: list[int] = tokenizer.encode(tokenizer.decode(list(ids)), add_special_tokens=False)
    return again == list(ids)


def _few(written: Experience, limit: int) -> Experience:
    """The first trajectories, as far as an engine may read them; at least one."""
    kept: list[ScoredTrajectory] = []
    total = 0
    for one in written.trajectories:
        lengths = [len(row.prompt_ids) + row.response_length for row in one.trajectory.rows]
        total += sum(lengths)
        if (kept and total > READ_TOKENS) or max(lengths) >= limit:
            break
        kept.append(one)
    return Experience(kept)


def _with_logprobs(written: Experience, scores: Sequence[Sequence[float]]) -> Experience:
    """With other log-probs; `scores`: of each row's tokens after the first."""
    left = iter(scores)
    changed = []
    for one in written.trajectories:
        rows = tuple(_row_with(row, next(left)) for row in one.trajectory.rows)
        changed.append(replace(one, trajectory=replace(one.trajectory, rows=rows)))
    return Experience(changed)


def _row_with(row: Row, scores: Sequence[float]) -> Row:
    spans, start = [], len(row.prompt_ids) - 1
    for span in row.spans:
        end = start + len(span.token_ids)
        own = scores[start:end] if span.author == "sampled" else ()
        spans.append(replace(span, logprobs=own))
        start = end
    return replace(row, spans=tuple(spans))


def _logprobs(written: Experience) -> Tensor:
    """[N, R] those of its tokens."""
    # A copy, as the recorder tells bypass mode by the object.
    return torch.clone(written.batch(pad_id=0)["rollout_logprobs"])


def _differing(before: Experience, after: Experience) -> str:
    """How many answers differ, in tokens or log-probs."""
    pairs = zip(before.trajectories, after.trajectories, strict=False)
    count = sum(one.trajectory.rows != other.trajectory.rows for one, other in pairs)
    return f"{count} of {len(before.trajectories)} answers differ from the first"
