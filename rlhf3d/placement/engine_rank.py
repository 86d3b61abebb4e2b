"""One engine rank: a process in which vLLM steps in a thread of its own.

Invariant: Ray's methods touch no vLLM: they put commands into the rank's `EngineLoop` and wait for
their results, or return at once. A recording of the loop's thread is begun and taken beside it, and
is no command: a replay knows nothing of it.
Runs in: engine rank. The driver imports this file to name the methods it calls, and no torch
with it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from rlhf3d.observability.logs import setup_logging
from rlhf3d.observability.profile.clock import this_machine
from rlhf3d.observability.profile.operations import OperationsSettings
from rlhf3d.observability.profile.recorder import start_recording, take_record
from rlhf3d.observability.profile.spans import Record
from rlhf3d.parallel.meeting import open_meeting
from rlhf3d.placement.cluster import use_node_interface
from rlhf3d.rollout.engine_loop import EngineLoop, Progress
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_engine import VLLMEngine
from rlhf3d.tokenizer.load import bare_tokenizer, check_files
from rlhf3d.tokenizer.texts import plain_texts

CALLS = 16
"""Ray calls that a rank takes at once: one that waits for progress, and commands."""


class EngineRank:
    """Ray actor of one engine rank; vLLM starts in it once its ranks know where to meet."""

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        rank: int,
        threads: int,
        timeout_s: float,
        output_dir: str | None,
    ) -> None:
        """Set the process up; its log goes to `logs/` of the run's folder, if there is one.

        `timeout_s`: deadline of every command.
        """
        assert "torch" not in sys.modules, "torch would not see the number of threads"
        os.environ.update(settings.platform.thread_settings(threads))
        self._name, self._rank, self._timeout_s = name, rank, timeout_s
        self._engine = VLLMEngine(settings, threads=threads, rank=rank)
        self._loop: EngineLoop
        self._texts_by = settings.tokenizer
        self._tokenizer: Any = None
        use_node_interface()
        if output_dir is not None:
            os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its records then reach ours
            setup_logging(output_dir, name.replace(" ", "_"), prints=True)
            # At its start it tries a chat template without a tokenizer, and logs a traceback.
            logging.getLogger("vllm.renderers").setLevel(logging.ERROR)

    def process_id(self) -> int:
        """Answer while the process lives, whatever its engine does."""
        return os.getpid()

    def start_profile(self, operations: OperationsSettings | None) -> str:
        """Begin to record what this rank does; return whose clock it goes by."""
        start_recording(operations=operations)
        return this_machine()

    def clock_ns(self) -> int:
        """Return the time on the clock of this rank's machine."""
        return time.monotonic_ns()

    def take_profile(self, began: int) -> Record | None:
        """End the recording; return it. `began`: of the step, on this machine's clock."""
        return take_record(began)

    def rendezvous(self) -> tuple[str, int]:
        """Open the address at which this engine's ranks meet; asked of its rank 0."""
        return ray.util.get_node_ip_address(), open_meeting()

    def start_at(
        self, meeting: tuple[str, int], timeout_s: float, schedule: Sequence[int] = ()
    ) -> None:
        """Start vLLM, together with the engine's other ranks, and its loop.

        `schedule`: see `EngineLoop`.
        """
        if self._texts_by is not None:
            # It is loaded for the first completions, minutes later: the start is to find a node
            # that lacks it, and not to take the seconds that loading takes.
            check_files(self._texts_by)
        start = partial(self._engine.start, meeting, host=ray.util.get_node_ip_address())
        self._loop = EngineLoop(
            start,
            rank=self._rank,
            name=self._name,
            timeout_s=self._timeout_s,
            schedule=schedule,
        )
        self._loop.wait_started(timeout_s)

    def call(self, number: int, method: str, args: tuple[Any, ...], alone: bool) -> Any:
        """Apply a method of `VLLMEngine` as command `number`; its result. See `EngineLoop.send`."""
        return self._loop.call(number, method, *args, alone=alone)

    def send(self, number: int, method: str, args: tuple[Any, ...], alone: bool) -> None:
        """Have a method of `VLLMEngine` applied as command `number`, and return at once."""
        self._loop.send(number, method, *args, alone=alone)

    def poll(self, after: int, timeout_s: float) -> Progress:
        """See `EngineLoop.poll`; completions have their texts, where the settings say so."""
        progress = self._loop.poll(after, timeout_s)
        if self._texts_by is None or not progress.completions:
            return progress
        # Here, beside the loop's thread: the driver would make the texts of all engines.
        if self._tokenizer is None:
            self._tokenizer = bare_tokenizer(self._texts_by)
        made = progress.completions
        texts = plain_texts(self._tokenizer, [one.token_ids for one in made.values()])
        pairs = zip(made.items(), texts, strict=True)
        told = {number: replace(one, text=text) for (number, one), text in pairs}
        return replace(progress, completions=told)
