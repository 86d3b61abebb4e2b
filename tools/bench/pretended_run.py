"""A run whose ranks are pretended: the driver's own components around a `PretendedRay`.

Invariant: between the prompts' file and the files of the run all is the package's code; training
ranks, engine ranks and the disk of checkpoints alone are stood in for, and count for nothing.
"""

from __future__ import annotations

import io
import random
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from pretended_ray import Meter, Pickled, PretendedRay, Ref
from torch import Tensor

from rlhf3d.algorithms.objectives import Objective
from rlhf3d.batching.batch import Batch
from rlhf3d.checkpoints.manifest import FileInfo
from rlhf3d.config.derived import Derived, derive, micro_batching_of
from rlhf3d.config.schema import Config
from rlhf3d.data.dataset import PromptDataset
from rlhf3d.data.loader import PromptLoader
from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow
from rlhf3d.engine.microbatch import UpdateResult
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.tokens import TokenRecorder
from rlhf3d.models.spec import ModelSpec
from rlhf3d.observability.console import Console
from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.parallel.host_allocator import keep_freed
from rlhf3d.parallel.platform import Platform
from rlhf3d.placement import rollout_group, train_group, waiting
from rlhf3d.placement.engine_rank import EngineRank
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.placement.resources import place
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.worker import TrainWorker, WorkerSetup, worker_setup
from rlhf3d.resharding.sending import SendReport
from rlhf3d.resharding.setup import sync_setup
from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.manager import RewardManager, ScoringBatch
from rlhf3d.rollout.api import Completion, Request, SyncReport, written_by
from rlhf3d.rollout.desk import Desks
from rlhf3d.rollout.engine_loop import Progress
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.tokenizer.end_tokens import EndTokens
from rlhf3d.tokenizer.texts import plain_texts
from rlhf3d.trainer import checkpointing, learner, loop, step_figures
from rlhf3d.trainer.assembly import Assembly
from rlhf3d.trainer.best import BestTracker
from rlhf3d.trainer.checkpointing import CheckpointWriter
from rlhf3d.trainer.components import RunComponents
from rlhf3d.trainer.health import HealthMonitor
from rlhf3d.trainer.inputs import RunInputs
from rlhf3d.trainer.preemption import PreemptionHandler
from rlhf3d.trainer.processes import Processes
from rlhf3d.trainer.step_log import StepLog

RULE = """
def compute_score(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(len(text) % 2) for text in solution_strs]
"""
PART = 8
"""Completions in one answer of an engine."""
WAVE = 64
"""Calls that have ended from one look at them to the next."""
LABELS: tuple[tuple[Any, str, str], ...] = (
    (RolloutGroup, "submit", "requests"),
    (RolloutGroup, "poll", "completions"),
    (JournalWriter, "write", "journal"),
    (Collector, "_decode", "text of tokens"),
    (ScoringBatch, "add", "hand to scorers"),
    (ScoringBatch, "finish", "scores"),
    (StepLog, "samples", "samples"),
    (StepLog, "tokens", "tokens"),
    (StepLog, "trained", "journal"),
    (Experience, "samples", "samples"),
    (Experience, "batch", "make the batch"),
    (train_group, "split_forward", "plan micro-batches"),
    (train_group, "split_update", "plan micro-batches"),
    (train_group, "gather", "gather"),
    (train_group, "pack", "rows of ranks"),
    (train_group, "put_in_rows", "rows in order"),
    (learner.Learner, "advantages", "advantages"),
    (learner, "correct", "mismatch"),
    (learner, "mismatch", "mismatch"),
    (HealthMonitor, "check_batch", "health"),
    (HealthMonitor, "check_rewards", "health"),
    (step_figures, "training_metrics", "metrics"),
    (step_figures, "fresh_tokens", "metrics"),
    (step_figures, "rollout_metrics", "metrics"),
    (CheckpointWriter, "save", "checkpoint"),
    (CheckpointWriter, "poll", "checkpoint"),
)
"""What of the driver's code is counted by itself: owner, attribute, label."""


class TrainRank:
    """Answers as `TrainWorker`, with columns of true shape."""

    def __init__(self, setup: WorkerSetup, rank: int) -> None:
        self._setup, self._rank = setup, rank
        layout = setup.group.layout
        self._last = layout.coords(rank).pp == layout.pp - 1
        self._collector = rank in layout.collectors()

    def rendezvous(self) -> tuple[str, int]:
        """As the rank's."""
        return "localhost", 1

    def build(self, address: str, port: int, threads: int) -> None:
        """As the rank's."""

    def peak_gib(self) -> float:
        """As the rank's."""
        return 64.0

    def create_stream(self, setup: Any) -> None:
        """As the rank's."""

    def open_stream(self, name: str, meeting: Any) -> None:
        """As the rank's."""

    def seal_stream(self, name: str) -> None:
        """As the rank's."""

    def send_weights(self, name: str, policy_version: int, sync: int) -> SendReport:
        """As the rank's."""
        return SendReport(1 << 30, 1.0)

    def forward(self, phase: Ref, role: Ref, rows: Ref, micro_batches: Ref) -> Pickled:
        """As the rank's: log-probs near those of the engine."""
        return self._answer(TrainWorker.forward, rows, role, phase, role, rows, micro_batches)

    def update(self, role: Ref, rows: Ref, mini_batches: Ref, objective: Ref) -> Pickled:
        """As the rank's."""
        return self._answer(TrainWorker.update, rows, role, role, rows, mini_batches, objective)

    def _answer(self, method: Callable[..., Any], rows: Ref, role: Ref, *args: Ref) -> Pickled:
        """What the package's worker makes of a pretended engine; once for ranks that do the same.

        Nobody reads what ranks before the last stage answer.
        """
        if not self._last:
            return Pickled(None)
        if self._collector not in rows.answers:
            given = [arg.load() for arg in args]
            rows.answers[self._collector] = Pickled(method(self._worker(role.load()), *given))
        return rows.answers[self._collector]

    def start_save(self, role: str, folder: str, wait: bool) -> None:
        """As the rank's."""

    def written(self) -> bool:
        """As the rank's."""
        return True

    def finish_save(self) -> dict[str, FileInfo]:
        """As the rank's: two files."""
        return {f"__{self._rank}_{part}.distcp": FileInfo(1 << 30, part) for part in range(2)}

    def _worker(self, role: str) -> Any:
        worker: Any = TrainWorker.__new__(TrainWorker)
        worker.setup, worker.rank = self._setup, self._rank
        worker.engines = {role: _Engine()}
        return worker


class _Engine:
    """In place of a `MegatronEngine` of the last stage."""

    def forward(self, batch: Batch, micro_batches: Any) -> dict[str, Tensor]:
        return {"logprobs": _logprobs(batch), "entropy": -_logprobs(batch)}

    def update(self, batch: Batch, mini_batches: Any, objective: Objective) -> UpdateResult:
        own = _logprobs(batch) if objective.old_is_current else None
        return UpdateResult({"actor/loss": 0.1}, 1.0, 1e-6, logprobs=own)


def _logprobs(batch: Batch) -> Tensor:
    """Of each row another number, so that rows in a wrong order are seen."""
    return -batch["response_mask"] * logprob_of(batch["response_lengths"])[:, None]


def logprob_of(lengths: Tensor) -> Tensor:
    """The negative log-prob that pretended ranks give every token of rows so long."""
    return lengths.float() / 4096


@dataclass
class Texts:
    """Where prompts and completions come from: one long text in tokens."""

    tokenizer: Any
    ids: array[int]
    shortest: int
    longest: int
    shape: float
    """Of the Pareto distribution of lengths."""

    def completion(self, seed: int) -> Completion:
        """The same for the same seed."""
        draw = random.Random(seed)
        length = min(int(self.shortest * draw.random() ** (-1 / self.shape)), self.longest)
        start = draw.randrange(len(self.ids) - length)
        # As engines give them: arrays, no object per token.
        logprobs = array("f", [-length / 4096]) * length
        reason = "length" if length == self.longest else "stop"
        ids = self.ids[start : start + length]
        (text,) = plain_texts(self.tokenizer, [ids])
        return Completion(ids, logprobs, reason, written_by(0), text)


class EnginePretended:
    """Answers as `EngineRank`, in parts of `PART` completions."""

    def __init__(self, texts: Texts, versions: dict[str, int], name: str, rank: int) -> None:
        self._texts, self._versions, self._first = texts, versions, rank == 0
        self._left: dict[int, Request] = {}
        self._steps = 0

    def process_id(self) -> int:
        """As the rank's."""
        return 1

    def rendezvous(self) -> tuple[str, int]:
        """As the rank's."""
        return "localhost", 1

    def start_at(self, meeting: Any, timeout_s: float, schedule: Sequence[int]) -> None:
        """As the rank's."""

    def call(self, number: int, method: str, args: tuple[Any, ...], alone: bool) -> Any:
        """As the rank's: an update of the weights, or nothing."""
        if method == "publish":
            self._versions["served"] = args[0]
        if method == "update_weights":
            return SyncReport(args[0], 1 << 30, 0.1, 0.1, 0.1)
        return None

    def send(self, number: int, method: str, args: tuple[Any, ...], alone: bool) -> None:
        """As the rank's."""
        if method == "submit" and self._first:
            self._left |= args[0]

    def poll(self, after: int, timeout_s: float) -> Progress:
        """As the rank's."""
        self._steps += 1
        part = [self._left.popitem() for _ in range(min(PART, len(self._left)))]
        version = written_by(self._versions["served"])
        done = {}
        for number, request in part:
            done[number] = replace(self._texts.completion(request.seed), versions=version)
        return Progress(done, self._steps, not self._left)


def write_prompts(folder: Path, count: int, words: Sequence[str]) -> Path:
    """Prompts of real text, 64 to 384 words."""
    draw, rows = random.Random(0), []
    for number in range(count):
        length = draw.randrange(64, 384)
        start = draw.randrange(len(words) - length)
        prompt = [{"role": "user", "content": " ".join(words[start : start + length])}]
        rule = {"style": "rule", "ground_truth": str(number)}
        rows.append(PromptRow("bench", prompt, "math", rule))
    write_parquet(rows, folder / "prompts.parquet", {})
    return folder / "prompts.parquet"


class PretendedCheckpoints(CheckpointWriter):
    """On a disk that has room for any model."""

    def check_room(self, export: bool) -> None:
        """Nothing is written but what the driver writes."""
        self.store.folder.mkdir(parents=True, exist_ok=True)


def start(
    stack: ExitStack,
    config: Config,
    platform: Platform,
    spec: ModelSpec,
    tokenizer: Any,
    texts: Texts,
    meter: Meter,
    data: Path,
) -> loop.Trainer:
    """The run's components, its ranks pretended; `stack` ends it."""
    keep_freed()  # as `run_training` does
    folder, versions = Path(config.trainer.output_dir), {"served": 0}
    stand_ins = {TrainWorker: TrainRank, EngineRank: _engines(texts, versions)}
    ray = PretendedRay(meter, stand_ins, WAVE)
    for module in (train_group, rollout_group, waiting):
        stack.enter_context(mock.patch.object(module, "ray", ray))
    stack.enter_context(mock.patch.object(train_group, "load_spec", lambda folder: spec))
    # Of files with weights, which are not here.
    stack.enter_context(mock.patch.object(checkpointing, "identity_state", lambda *args: {}))
    for module in (train_group, rollout_group):
        name = "PlacementGroupSchedulingStrategy"
        stack.enter_context(mock.patch.object(module, name, lambda *args: None))
    for owner, name, label in LABELS:
        stack.enter_context(mock.patch.object(owner, name, _labeled(meter, owner, name, label)))
    data_set = PromptDataset([data], tokenizer, config.data.max_prompt_length, "filter")
    loader = PromptLoader(data_set, config.data.train_batch_size, 0)
    (folder / "rule.py").write_text(RULE)
    rule = load_custom_reward(folder / "rule.py")
    inputs = RunInputs(spec, tokenizer, EndTokens((), ()), data_set, None, loader, rule)
    derived = derive(config)
    journal = stack.enter_context(JournalWriter(folder))
    console = stack.enter_context(Console(io.StringIO(), interactive=False))
    recorder = TokenRecorder(tokenizer, config.trainer.sample_tokens)
    log = StepLog(
        console,
        MetricsWriter(folder),
        config.trainer.total_training_steps or 1,
        derived.devices,
        recorder,
        journal=journal,
    )
    rewards = stack.enter_context(RewardManager(rule, workers=2))
    processes = _processes(config, derived, spec, platform, journal)
    assembly = Assembly(config, derived, inputs, processes, rewards, log)
    return loop.Trainer(config, _components(assembly, processes))


def _components(assembly: Assembly, processes: Processes) -> RunComponents:
    weights = assembly.weight_sync()
    desks = Desks(weights.engines)
    nothing: Any = None
    return RunComponents(
        source=assembly.source(weights, desks),
        learner=assembly.learner(weights),
        weights=weights,
        validation=nothing,
        checkpoints=PretendedCheckpoints(
            assembly.config, assembly.inputs.spec, assembly.trained(), nothing
        ),
        best=BestTracker(None),
        health=assembly.health(),
        log=assembly.log,
        preemption=PreemptionHandler(None, 0.0),
        prepare=assembly.inputs.loader.prepare,
    )


def _engines(texts: Texts, versions: dict[str, int]) -> Callable[..., EnginePretended]:
    def make(name: str, settings: Any, rank: int, *others: Any) -> EnginePretended:
        return EnginePretended(texts, versions, name, rank)

    return make


def _labeled(meter: Meter, owner: Any, name: str, label: str) -> Any:
    found = owner.__dict__[name]
    if isinstance(found, property):
        assert found.fget is not None
        return property(meter.wrapped(found.fget, label))
    return meter.wrapped(found, label)


def _processes(
    config: Config, derived: Derived, spec: ModelSpec, platform: Platform, journal: JournalWriter
) -> Processes:
    """As `start_processes`, on nodes that are as large as the configuration says."""
    rollout, colocated = config.rollout, config.rollout.placement == "colocated"
    placement = place(
        platform,
        derived.groups,
        rollout.engines,
        rollout.tensor_parallel_size,
        colocated,
        config.cluster.num_nodes,
    )
    reserved: Any = None
    nodes = [rank // config.cluster.gpus_per_node for rank in range(derived.world_size)]
    sync = sync_setup(rollout, spec, derived.layout, platform, "bench", nodes)
    ranks = rollout.tensor_parallel_size
    bundles = [list(range(first, first + ranks)) for first in range(0, derived.engine_ranks, ranks)]
    settings = EngineSettings("", rollout, derived.max_sequence_length, platform)
    engines = RolloutGroup(
        settings,
        config.cluster,
        placement,
        reserved,
        bundles,
        [[1] * ranks] * rollout.engines,
        None,
        journal,
    )
    groups: dict[str, TrainGroup] = {}
    for group in derived.groups:
        made = TrainGroup(
            worker_setup(config, group, platform, 1),
            config.cluster,
            placement,
            reserved,
            [1] * group.layout.world_size,
            {role: micro_batching_of(config, role) for role in group.roles},
            config.data.max_response_length,
        )
        made.wait_ready()
        groups |= dict.fromkeys(group.roles, made)
    engines.wait_ready()
    return Processes(groups, engines, sync)
