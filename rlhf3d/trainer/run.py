"""One run from its config to its report: build the parts, run the loop, leave nothing behind.

Invariant: whatever ends the run (the last step, an error, Ctrl-C), every process and shared file it made is gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf3d.checkpoints.resume import (
    CHECKPOINTS,
    Checkpoint,
    Start,
    check_resume,
    choose_start,
    set_aside,
)
from rlhf3d.checkpoints.store import Store
from rlhf3d.checkpoints.writer import CheckpointWriter
from rlhf3d.config.derived import Derived, derive, micro_batching_of
from rlhf3d.config.groups import TRAINABLE, WorkerGroup
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config
from rlhf3d.config.summary import summary_lines
from rlhf3d.data.loader import Curriculum, Prompt, PromptDataset, PromptLoader
from rlhf3d.models.folder import weight_files
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.observability.console import Console
from rlhf3d.observability.logs import quiet_libraries, setup_logging
from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.report import CURVES_FILE, make_report
from rlhf3d.observability.samples import before_after, drop_samples
from rlhf3d.parallel.platform import Platform, choose_platform
from rlhf3d.placement.cluster import cores_of, nodes_of, ray_cluster, reserve
from rlhf3d.placement.cluster_check import check_cluster
from rlhf3d.placement.resources import engine_bundles, engine_threads, place, threads_of
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.worker import TrainWorker, worker_setup
from rlhf3d.resharding.setup import SyncSetup, sync_setup
from rlhf3d.resharding.sync import WeightSync
from rlhf3d.rewards.make import make_reward, model_part
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.truth_check import training_warnings
from rlhf3d.rollout.api import Stops
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.tokenizer.end_tokens import EndTokens, end_tokens
from rlhf3d.tokenizer.load import load_tokenizer, vocabulary_notes
from rlhf3d.trainer.ppo import Parts, PPOTrainer
from rlhf3d.trainer.reward_model import RewardModel
from rlhf3d.trainer.stopping import PREEMPTED, Stopping

CANARY_PROMPTS = 4


def run_training(config: Config, stopping: Stopping) -> int:
    """Run the whole job; 0 when it is done, PREEMPTED when it stopped before, after a checkpoint.

    Errors are raised; the command line turns them, and Preempted, into exit codes.
    """
    stopping.limit_s = config.trainer.max_wall_clock_s
    quiet_libraries()
    platform = choose_platform(config.cluster.platform)
    config = resolve_platform(config, platform)
    spec, tokenizer = load_spec(config.model.path), load_tokenizer(config.model.path)
    train_data = _dataset(config, tokenizer, "train_files", spec.vocab_size)
    val_data = (
        _dataset(config, tokenizer, "val_files", spec.vocab_size) if config.data.val_files else None
    )
    held_out = [] if val_data is None else [val_data]
    ends = end_tokens(config.model.path, tokenizer, spec.vocab_size, config.rollout.stop_token_ids)
    at_once = config.data.gen_batch_size or config.data.train_batch_size
    order = config.data.curriculum
    curriculum = (
        Curriculum(order.path, order.name, order.kwargs) if order.path is not None else None
    )
    loader = PromptLoader(
        train_data,
        at_once,
        config.trainer.seed,
        config.data.shuffle,
        config.data.train_weights,
        curriculum,
    )
    reward = make_reward(
        config.reward,
        config.custom_reward_function,
        {source for data in (train_data, *held_out) for source in data.data_sources},
    )
    derived = derive(config, len(train_data))
    total_steps = derived.total_steps
    assert total_steps is not None
    start = choose_start(config, total_steps)
    if start.finished is not None:
        return _say_finished(start.finished)
    config, found, notes = _start(start, spec)
    if found is not None:  # other data are refused before anything is started
        loader.load_state_dict(found.state["loader"])
    output = Path(config.trainer.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    setup_logging(output, "driver")

    with ExitStack() as stack:
        console = stack.enter_context(Console())
        metrics = stack.enter_context(_metrics(output, found))
        rewards = stack.enter_context(
            RewardManager(
                reward,
                workers=config.reward.workers,
                timeout_s=config.reward.timeout_s,
                max_error_rate=config.reward.max_error_rate,
            )
        )
        prompts = [data.summary() for data in (train_data, *held_out)]
        prompts += [
            f"warning: {text}" for text in training_warnings(train_data, val_data, reward, rewards)
        ]
        of_model = weight_files(Path(config.model.path)).notes
        of_tokens = (*vocabulary_notes(tokenizer, spec.vocab_size), *ends.notes)
        prompts += [f"warning: {text}" for text in (*of_model, *of_tokens)]
        lines = [
            *summary_lines(config, derived),
            *prompts,
            f"platform {platform.kind}: {platform.reason}",
            *notes,
        ]
        console.header(lines, total_steps, found.manifest.step if found else 0)
        groups, rollout, setup = _start_processes(
            stack, config, derived, spec, platform, console, stopping, ends
        )
        if "reward" in groups:
            settings = config.reward_model
            assert settings.path is not None
            model = RewardModel(settings, groups["reward"], load_tokenizer(settings.path))
            rewards.add_model(model, model_part(config.reward, settings))
        canary = canary_tokens(val_data or train_data)
        sync = stack.enter_context(
            closing(WeightSync(config, setup, groups["actor"], rollout, canary))
        )
        trained = {
            role: groups[g.name] for g in derived.groups for role in g.roles if role in TRAINABLE
        }
        checkpoints = CheckpointWriter(config, spec, trained, sync)
        checkpoints.check_room(export=config.trainer.save_hf != "never")
        if config.trainer.save_hf != "never":
            sync.exporting_rank()  # refused here rather than after the last step
        trainer = PPOTrainer(
            Parts(
                config=config,
                derived=derived,
                total_steps=total_steps,
                tokenizer=tokenizer,
                train=groups["actor"],
                critic=groups.get("critic", groups["actor"]),
                rollout=rollout,
                sync=sync,
                scoring=rewards,
                loader=loader,
                val=val_data or (),
                console=console,
                metrics=metrics,
                checkpoints=checkpoints,
                stopping=stopping,
            )
        )
        if found is not None:
            with console.phase("load_checkpoint"):
                _load(found, trainer, trained)
        with stopping.loop():
            stopped = trainer.fit()
        with _spared(
            console, "the engines did not end in order", "every process is ended all the same"
        ):
            rollout.close()
        if stopped is not None:
            console.done(
                [
                    f"stopped: {stopped}",
                    f"checkpoint {checkpoints.last}",
                    "the same command goes on from it",
                ]
            )
            return PREEMPTED
        _show_results(output, console, checkpoints)
    return 0


def canary_tokens(prompts: Iterable[Prompt]) -> list[Sequence[int]]:
    """What both sides of a sync score: the first prompts, each of at least two tokens, as the first has no score."""
    ids = [prompt.prompt_ids for prompt in islice(prompts, CANARY_PROMPTS)]
    return [tokens if len(tokens) > 1 else tokens * 2 for tokens in ids]


class _Processes(NamedTuple):
    """What runs the models of a run."""

    groups: dict[str, TrainGroup]
    """Training ranks by worker group."""
    rollout: RolloutGroup
    setup: SyncSetup


def _start_processes(
    stack: ExitStack,
    config: Config,
    derived: Derived,
    spec: ModelSpec,
    platform: Platform,
    console: Console,
    stopping: Stopping,
    ends: EndTokens,
) -> _Processes:
    """Join Ray, reserve the cluster's devices, check its nodes, start ranks and engines; `stack` ends them again."""
    cluster, engines = config.cluster, config.rollout
    placement = place(
        platform,
        derived.groups,
        engines.engines,
        engines.tensor_parallel_size,
        engines.placement == "colocated",
        1 if cluster.ray_address is None else cluster.num_nodes,
    )
    devices = platform.pretended_devices(placement.gpus)
    stack.enter_context(
        ray_cluster(cluster, placement.cpus, stopping.handle, devices, derived.batch_bytes)
    )
    reserved = stack.enter_context(reserve(placement, cluster.startup_timeout_s))
    check_cluster(config, reserved)
    with console.phase("start"):
        nodes, cores = nodes_of(reserved), cores_of(reserved, cluster.startup_timeout_s)
        places = {
            name: [nodes[bundle] for bundle in ranks] for name, ranks in placement.groups.items()
        }
        setup = sync_setup(
            engines, spec, derived.layout, platform, f"{os.getpid()}", places["actor"]
        )
        bundles = engine_bundles(placement, setup.plan)
        threads = engine_threads(bundles, nodes, cores, engines.threads)
        stops = Stops(ends.ids, config.rollout.stop)
        settings = EngineSettings(
            os.path.abspath(config.model.path),
            engines,
            derived.max_sequence_length,
            platform,
            config.trainer.seed,
            stops,
        )
        steps = derived.total_steps
        assert steps is not None

        def start_group(group: WorkerGroup) -> TrainGroup:
            threads_here = threads_of(places[group.name], cores, cluster.threads_per_rank)
            return TrainGroup(
                worker_setup(config, group, platform, steps),
                cluster,
                placement,
                reserved,
                threads_here,
                {role: micro_batching_of(config, role) for role in group.roles},
                config.data.max_response_length,
            )

        def start_engines() -> RolloutGroup:
            folder = os.path.abspath(config.trainer.output_dir)
            return RolloutGroup(settings, cluster, placement, reserved, bundles, threads, folder)

        rollout, groups = start_models(
            config,
            platform,
            start_engines,
            {group.name: partial(start_group, group) for group in derived.groups},
        )
    return _Processes(groups, rollout, setup)


def start_models(
    config: Config,
    platform: Platform,
    start_engines: Callable[[], RolloutGroup],
    start_groups: Mapping[str, Callable[[], TrainGroup]],
) -> tuple[RolloutGroup, dict[str, TrainGroup]]:
    """Engines and training ranks, all ready; engines that measure what is free of a device are alone on it until they
    have, and asleep, where they may sleep, before others load there."""
    alone = platform.measures_cache and config.rollout.placement == "colocated"
    rollout = start_engines()
    if alone:
        rollout.wait_ready()
        if config.rollout.sleep:
            rollout.sleep()
    groups = {name: start() for name, start in start_groups.items()}
    for group in groups.values():
        group.wait_ready()
    if not alone:
        rollout.wait_ready()
    return rollout, groups


def _show_results(output: Path, console: Console, checkpoints: CheckpointWriter) -> None:
    """Report, curves, and answers before and after."""
    lines = _make_report(output, console)
    with _spared(
        console,
        "answers before and after cannot be shown",
        f"`rlhf3d samples {output}` shows answers",
    ):
        before, after = before_after(output)
        if before:
            console.samples(before, after)
    console.done([*lines, f"checkpoint {checkpoints.last}"])


def _make_report(output: Path, console: Console) -> list[str]:
    """Lines that say where report and curves are."""
    lines = []
    with _spared(
        console, "there is no report", f"`rlhf3d report {output}` makes it when that is put right"
    ):
        lines = [f"report {make_report(output)}", f"curves {output / CURVES_FILE}"]
    return lines


@contextmanager
def _spared(console: Console, what: str, then: str) -> Iterator[None]:
    """What comes after a run is complete is no reason to call it failed: say what went wrong instead."""
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).exception(what)
        first_line = str(error).partition("\n")[0]
        console.note(
            f"warning: {what} ({type(error).__name__}: {first_line}); the run is complete, {then}"
        )


def _say_finished(run: Path) -> int:
    """The same command again: what is there, and how to run it once more."""
    with Console() as console:
        _make_report(run, console)
        again = "trainer.resume_mode=never runs it again, in a folder beside it"
        console.done(
            [f"{run} is a finished run of this configuration, so nothing was done; {again}"]
        )
    return 0


def _start(start: Start, spec: ModelSpec) -> tuple[Config, Checkpoint | None, list[str]]:
    """Make the folder of a start ready: the configuration, what to load, lines for the user."""
    config, found, notes = start.config, start.checkpoint, start.notes
    if found is not None:
        changes = check_resume(found, config, spec)
        notes = [
            *notes,
            f"resume from step {found.manifest.step}: {found.folder}",
            *(f"changed {c}" for c in changes),
        ]
    store = Store(Path(config.trainer.output_dir) / CHECKPOINTS)
    if left := store.clean():
        notes.append(f"removed what a killed run left of {', '.join(left)}")
    if found is not None and found.run == Path(config.trainer.output_dir).resolve():
        if moved := set_aside(store, found.manifest.step):
            notes.append(f"later checkpoints are now named {', '.join(moved)}")
        drop_samples(config.trainer.output_dir, found.manifest.step)
    return config, found, notes


def _metrics(output: Path, found: Checkpoint | None) -> MetricsWriter:
    """The writer: rows after the checkpoint are dropped; in its run's folder its own is there, whenever that died."""
    if found is None:
        return MetricsWriter(output)
    writer, step = MetricsWriter(output, resume_step=found.manifest.step), found.manifest.step
    if found.run == output.resolve() and writer.last_step < step:
        writer.write(step, found.state["metrics"])
    return writer


def _load(found: Checkpoint, trainer: PPOTrainer, models: Mapping[str, TrainGroup]) -> None:
    """Load every model, then the driver's state."""
    same_ranks = True
    for role, group in models.items():
        folder = str((found.folder / role).resolve())
        same_ranks &= all(
            group.call_all(
                "load_checkpoint", TrainWorker.load, role, folder, found.manifest.optimizer
            )
        )
    if not same_ranks:
        trainer.parts.console.note(
            "other ranks than saved the checkpoint: equal to rounding, with fresh random state"
        )
    trainer.load_state_dict(found.state, found.manifest.policy_version)


def _dataset(config: Config, tokenizer: Any, key: str, vocab_size: int) -> PromptDataset:
    data = config.data
    limit = data.val_max_samples if key == "val_files" else -1
    return PromptDataset(
        getattr(data, key),
        tokenizer,
        data.max_prompt_length,
        data.overlong_prompts,
        limit,
        key=f"data.{key}",
        cache_dir=data.cache_dir,
        vocab_size=vocab_size,
    )
