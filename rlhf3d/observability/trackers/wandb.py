"""Weights & Biases: online where the user is logged in, else offline (`wandb sync` uploads it)."""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

import wandb

from rlhf3d.observability.trackers.protocol import TRACKERS_DIR, RunFacts, TableRun


class Wandb(TableRun):
    """See `Tracker`."""

    def __init__(self, facts: RunFacts) -> None:
        facts.local("wandb")
        name = facts.known_id("wandb") or secrets.token_hex(4)
        run = wandb.init(
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
        super().__init__(run, wandb.Table)


def _mode() -> Any:
    """None leaves it to wandb, which would ask on the terminal for a key that it does not have."""
    if "WANDB_MODE" in os.environ or wandb.api.api_key is not None:
        return None
    logging.getLogger(__name__).warning("no key for wandb is set: the run is recorded offline")
    return "offline"


track = Wandb
