"""How many steps a run is to make, and how it ended: the `run.json` of its folder.

Invariant: written at the start, at a resume and at the end, complete or not at all; a run that was
killed leaves what its start wrote, so a record without an end says nothing of whether it is alive.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rlhf3d.observability.whole_file import whole_file

RECORD_FILE = "run.json"

End = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds."""

    total_steps: int
    end: End | None = None
    """None while it runs, or where it was killed."""
    why: str = ""
    """It stopped or failed, in a line."""

    def __str__(self) -> str:
        """The end in words; empty without one."""
        if self.end is None:
            return ""
        return f"{self.end}: {self.why}" if self.why else self.end


def write_record(run: Path, record: RunRecord) -> None:
    """Write it, in place of the former one."""
    with whole_file(run / RECORD_FILE) as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read_record(run: Path) -> RunRecord | None:
    """The record of the run in a folder; None where there is none that can be read."""
    try:
        found = json.loads((run / RECORD_FILE).read_text(encoding="utf-8"))
        return RunRecord(int(found["total_steps"]), found["end"], str(found["why"]))
    # Runs of earlier versions have none; what is shown of a run does without it.
    except (OSError, ValueError, LookupError, TypeError):
        return None
