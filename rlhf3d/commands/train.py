"""`rlhf3d train`: check, run, and say in an exit code how it ended.

Invariant: a signal that asks the run to stop is handled from the first line on, imports included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf3d.commands.errors import raised_by_us
from rlhf3d.commands.overrides import Overrides
from rlhf3d.imports import quick_imports
from rlhf3d.terminal import tell

if TYPE_CHECKING:
    from rlhf3d.trainer.preemption import PreemptionHandler


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; `rlhf3d config` lists the keys.")],
    overrides: Overrides = None,
) -> None:
    """Train: check the configuration and this machine, then run the loop.

    Example: rlhf3d train configs/quickstart.yaml rollout.n=4 trainer.output_dir=runs/four
    """
    raise typer.Exit(ended(partial(_train, config, overrides or [])))


def ended(work: Callable[[PreemptionHandler], int]) -> int:
    """Run a loop; its exit code, whatever ends it."""
    from rlhf3d.trainer.preemption import PREEMPTED, Preempted, PreemptionHandler

    preemption = PreemptionHandler.of_this_process()
    with preemption.handling_signals():  # before anything that takes long, imports among it
        try:
            code = work(preemption)
        except Preempted:
            tell("stopped by a signal before the first step: the same command begins again")
            code = PREEMPTED
        except KeyboardInterrupt:
            tell("interrupted: every process of the run has ended, what it wrote stays")
            code = 130
        except SystemExit as error:
            # Nothing of ours raises it: it comes from a user's code, such as an estimator.
            tell(f"the run failed: code that it called ended the process with {error.code!r}")
            code = 1
        except RuntimeError as error:
            if preemption.signal is None or not raised_by_us(error):
                raise
            # The signal may have ended others too: workers of a cluster, or what the step was
            # waiting for.
            tell(f"{error}\n{preemption.signal} had come before: the same command continues")
            code = PREEMPTED
    return code


def _train(config: Path, overrides: list[str], preemption: PreemptionHandler) -> int:
    from rlhf3d.config.load import ConfigError
    from rlhf3d.config.resolve import load_run
    from rlhf3d.planning.view import show_memory
    from rlhf3d.preflight import preflight

    loaded = load_run(config, overrides)
    with quick_imports():  # the checks load torch and transformers
        if problems := preflight(loaded, show=show_memory):
            raise ConfigError(problems, f"This machine cannot run {config} as it stands")
        # After the checks: the loop is loaded only for a run that can start.
        from rlhf3d.trainer.run import run_training

    return run_training(loaded, preemption)
