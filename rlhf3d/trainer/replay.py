"""A run again from its journal: the same requests before the same steps of its engines.

Invariant: what is trained again goes to a folder of its own, and nothing of the run is changed.
Runs in: driver.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.checkpoints.identity import code_identity, model_identity
from rlhf3d.checkpoints.manifest import LIBRARIES
from rlhf3d.checkpoints.resume import CHECKPOINTS
from rlhf3d.checkpoints.store import CONFIG_FILE
from rlhf3d.config.keys import code_files
from rlhf3d.config.resolve import load_run
from rlhf3d.config.schema import Config
from rlhf3d.machine import package_versions
from rlhf3d.placement.journal import Segment, read_journal
from rlhf3d.placement.script import Script

REPLAY = "replay"
"""Folder in a run's."""
_MARKER = "replay_of.json"


@dataclass(frozen=True)
class Replay:
    """What is to be run again."""

    run: Path
    output: Path
    config: Config
    script: Script
    notes: Sequence[str]
    """What the user should know, one line each."""


def prepare(run: Path, after: int, until: int | None, output: Path | None) -> Replay:
    """Read a run's configuration and journal, and empty the folder of an earlier replay.

    `after`: the step after which to begin, 0 or one at which the run was resumed; `until`: the last
    step, None for the last there is. ValueError where there is nothing to repeat.
    """
    file = run / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{run} holds no {CONFIG_FILE}: give the trainer.output_dir of a run")
    segment, last = _part(read_journal(run), after)
    until = last if until is None else until
    if not after < until <= last:
        raise ValueError(
            f"--until {until}: from step {after} on, {run} can be repeated to step {last}"
            if last > after
            else f"{run} has no complete step after step {after}: there is nothing to repeat"
        )
    output = run / REPLAY if output is None else output
    _empty(output)
    config = load_run(file, _overrides(run, after, output))
    changed = _changed(config.model.path, code_files(config), segment.facts)
    notes = [*changed, *_left_out(segment, last, read_journal(run))]
    (output / _MARKER).write_text(json.dumps({"run": str(run), "after": after, "until": until}))
    return Replay(run, output, config, Script(segment, until), notes)


def _part(segments: Sequence[Segment], after: int) -> tuple[Segment, int]:
    """The part of a run that begins after a step, and its last step that the run kept."""
    begins = [segment.begin for segment in segments]
    if after not in begins:
        known = ", ".join(map(str, sorted(set(begins))))
        raise ValueError(f"--after {after}: the run began, or went on, after step {known}")
    # The last that began there: what earlier ones did has gone with a resume.
    number = max(place for place, begin in enumerate(begins) if begin == after)
    segment = segments[number]
    return segment, min([segment.last_step, *begins[number + 1 :]])


def _overrides(run: Path, after: int, output: Path) -> list[str]:
    """What a replay does otherwise than the run: it writes elsewhere, and saves nothing."""
    start = str(run / CHECKPOINTS / f"step_{after}") if after else "never"
    return [
        f"trainer.output_dir={output}",
        f"trainer.resume_mode={start}",
        "trainer.save_freq=0",
        "trainer.save_at_end=false",
        "trainer.max_wall_clock_s=null",
        # It is no other run: what tracks the first has its numbers.
        "trainer.logger=[tensorboard]",
    ]


def _empty(output: Path) -> None:
    """Make the folder; only an earlier replay is removed from it."""
    if output.exists() and any(output.iterdir()):
        if not (output / _MARKER).is_file():
            raise ValueError(f"{output} holds files that are no replay: name another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)


def _changed(model: str, code: dict[str, str], facts: dict[str, Any]) -> Iterator[str]:
    """What is not as it was in the run, and may make numbers differ."""
    now = {
        "versions": package_versions(LIBRARIES),
        "code": code_identity(code),
        "model": {"identity": model_identity(model)},
    }
    for what, values in now.items():
        before = facts.get(what, {})
        for name, value in values.items():
            if before.get(name) != value:
                yield f"otherwise than in the run: {what} {name}, {before.get(name)} to {value}"


def _left_out(segment: Segment, last: int, segments: Sequence[Segment]) -> Iterator[str]:
    """Parts of the run that are not repeated."""
    if segment.restarted:
        yield f"engines died after step {last}: what came then cannot be repeated"
    for later in sorted({one.begin for one in segments if one.begin > segment.begin}):
        yield f"the run went on from its checkpoint of step {later}: see --after {later}"
