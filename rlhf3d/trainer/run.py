"""One run from its config to its report: build the components, run the loop, leave nothing behind.

Invariant: whatever ends the run (the last step, an error, Ctrl-C), every process and shared file it
made is gone.
Runs in: driver.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rlhf3d.checkpoints.identity import identity_state
from rlhf3d.checkpoints.resume import Checkpoint, flat_config
from rlhf3d.checkpoints.store import CONFIG_FILE
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config, RewardConfig
from rlhf3d.config.summary import summary_lines
from rlhf3d.experience.source import ExperienceSource
from rlhf3d.experience.tokens import TokenRecorder
from rlhf3d.observability.console import Console, reported_only
from rlhf3d.observability.live.waits import waited
from rlhf3d.observability.logs import LOGS_DIR, quiet_libraries, setup_logging
from rlhf3d.observability.metrics import read_metrics
from rlhf3d.observability.outcome import End, RunRecord, write_record
from rlhf3d.parallel.host_allocator import keep_freed
from rlhf3d.parallel.platform import choose_platform
from rlhf3d.placement.script import EndOfScript, Script
from rlhf3d.planning.of_run import planned_memory
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.truth_warnings import training_warnings
from rlhf3d.trainer.assembly import Assembly
from rlhf3d.trainer.ending import recorded
from rlhf3d.trainer.inputs import RunInputs, read_to_start
from rlhf3d.trainer.loop import Trainer
from rlhf3d.trainer.preemption import PREEMPTED, PreemptionHandler
from rlhf3d.trainer.start import (
    load_checkpoint,
    open_journal,
    open_metrics,
    prepare_folder,
)
from rlhf3d.trainer.step_log import StepLog


def run_training(
    config: Config, preemption: PreemptionHandler, script: Script | None = None
) -> int:
    """Run the complete job; 0 when it is done, PREEMPTED when it stopped early, after a checkpoint.

    `script`: a run that this one repeats, up to a step of it.
    Errors are raised; the command line turns them, and Preempted, into exit codes.
    """
    # The handler is older than the configuration: signals reach it from the start.
    preemption.limit_s = config.trainer.max_wall_clock_s
    quiet_libraries()
    platform = choose_platform(config.cluster.platform)
    config = resolve_platform(config, platform)
    # First everything that can be wrong with files, while nothing has been started or written.
    inputs, derived, start = read_to_start(config, None if script is None else script.began)
    assert derived.total_steps is not None
    if start.finished is not None:
        # Here and below: what shows a run is loaded when there is something to show.
        from rlhf3d.results.end import show_finished

        return show_finished(start.finished)
    notes = prepare_folder(start, config, inputs.spec)
    output, checkpoint = start.folder, start.checkpoint
    config = replace(config, trainer=replace(config.trainer, output_dir=str(output)))
    if checkpoint is not None:  # here already: other data are refused before anything is started
        inputs.loader.load_state_dict(checkpoint.state["loader"])
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG_FILE).write_text(config_to_yaml(config), encoding="utf-8")
    setup_logging(output, "driver")
    # The stack ends what is started below, the last one first: engines before Ray, the console and
    # the metrics file, which the ending may still write to, at the end.
    with recorded(output, derived.total_steps, preemption), ExitStack() as stack:
        console = stack.enter_context(Console(waited=waited))
        writer = stack.enter_context(
            open_metrics(config.trainer, flat_config(config), checkpoint, console.note)
        )
        recorder = TokenRecorder(inputs.tokenizer, config.trainer.sample_tokens)
        identity = identity_state(config, inputs.spec)
        journal = stack.enter_context(open_journal(output, identity, checkpoint))
        log = StepLog(
            console, writer, derived.total_steps, derived.devices, recorder, journal=journal
        )
        # Before the header: its warnings come from scoring the data's own answers.
        rewards = stack.enter_context(_reward_manager(config.reward, inputs.rule))
        lines = [
            *summary_lines(config, derived),
            *_input_lines(inputs, Path(config.model.path), rewards),
            f"platform {platform.kind}: {platform.reason}",
            f"logs       {output / LOGS_DIR}/: what libraries print, a file per process",
            *notes,
        ]
        done_steps = checkpoint.manifest.step if checkpoint else 0
        # A figure on the screen: no reason to end a run that could train.
        planned = None
        with reported_only(console, "memory was not planned", "the run goes on without the figure"):
            planned = planned_memory(output / CONFIG_FILE)
        rows = read_metrics(output) if done_steps else []
        console.header(lines, log.total_steps, done_steps, planned, rows)
        # The columns of each step in the pages of the last one's.
        keep_freed()
        assembly = Assembly.start(
            stack, config, derived, inputs, platform, rewards, log, journal, preemption, script
        )
        return _train(stack, assembly, checkpoint, preemption)


def _train(
    stack: ExitStack,
    assembly: Assembly,
    checkpoint: Checkpoint | None,
    preemption: PreemptionHandler,
) -> int:
    """Run the loop and show what came out; the exit code."""
    components, console = assembly.components(stack, preemption), assembly.log.console
    # However the run ends, before Ray does: Python ends what is under way with its last reference,
    # and that tells engines.
    stack.callback(_give_up, components.source)
    trainer = Trainer(assembly.config, components)
    if checkpoint is not None:
        # Before the first sync: the engines get what is loaded here.
        with console.phase("load_checkpoint"):
            load_checkpoint(checkpoint, assembly.trained(), components)
        trainer.step = checkpoint.manifest.step
    assembly.log.begin()
    with preemption.loop():
        try:
            stopped = trainer.fit()
        except EndOfScript:
            stopped = None
    # vLLM ends best when it is asked; the stack ends whoever does not answer.
    what = "the engines did not end in order"
    with reported_only(console, what, "every process is ended all the same"):
        components.source.close()
        assembly.processes.rollout.close()
    last, output = components.checkpoints.last, Path(assembly.config.trainer.output_dir)
    # Before the report, which tells it.
    end: End = "finished" if stopped is None else "stopped"
    write_record(output, RunRecord(trainer.total_steps, end, stopped or ""))
    if stopped is not None:
        lines = [f"stopped: {stopped}", f"checkpoint {last}", "the same command continues from it"]
        console.done(lines)
        return PREEMPTED
    if components.script is not None:
        return 0
    from rlhf3d.results.end import show_results

    show_results(output, console, last)
    return 0


def _give_up(source: ExperienceSource) -> None:
    """End what is under way; what goes wrong in it hides no other error."""
    try:
        source.close()
    except Exception:
        logging.getLogger(__name__).exception("what was under way did not end in order")


def _reward_manager(reward: RewardConfig, rule: RewardFunction | None) -> RewardManager:
    return RewardManager(
        rule,
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        max_error_rate=reward.max_error_rate,
    )


def _input_lines(inputs: RunInputs, model: Path, rewards: RewardManager) -> Iterator[str]:
    """What was read, and what is odd about it."""
    for data in inputs.datasets:
        yield data.summary()
    for text in training_warnings(inputs.train_data, inputs.val_data, inputs.rule, rewards):
        yield f"warning: {text}"
    for text in inputs.notes(model):
        yield f"warning: {text}"
