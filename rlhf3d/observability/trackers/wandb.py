"""Weights & Biases: online where the user is logged in, else offline (`wandb sync` uploads it)."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.observability.trackers.protocol import COLUMNS, TRACKERS_DIR, RunFacts, table_rows


class Wandb:
    """See `Tracker`."""

    def __init__(self, facts: RunFacts) -> None:
        facts.local("wandb")
        name = facts.known_id("wandb") or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", facts.project),
            name=facts.name,
            id=name,
            resume="allow",
            # It makes a folder wandb/ there.
            dir=os.environ.get("WANDB_DIR", str(facts.folder / TRACKERS_DIR)),
            mode=_mode(),
            config={**facts.config, "versions": dict(facts.versions)},
            # The configuration may change at a resume, which the run reports.
            allow_val_change=True,
            # The terminal is the run's, and its lines are in logs/.
            settings=wandb.Settings(console="off", silent=True),
        )
        facts.keep_id("wandb", name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        table = wandb.Table(columns=list(COLUMNS), data=table_rows(step, rows))
        self._run.log({f"samples/{kind}": table}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _mode() -> Any:
    """None leaves it to wandb, which would ask on the terminal for a key that it does not have."""
    if "WANDB_MODE" in os.environ or wandb.api.api_key is not None:
        return None
    logging.getLogger(__name__).warning("no key for wandb is set: the run is recorded offline")
    return "offline"


track = Wandb
