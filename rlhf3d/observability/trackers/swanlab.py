"""SwanLab: online where SWANLAB_API_KEY is set, else offline (`swanlab sync` uploads it)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence

import swanlab

from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.observability.trackers.protocol import COLUMNS, RunFacts, table_rows


class SwanLab:
    """See `Tracker`."""

    def __init__(self, facts: RunFacts) -> None:
        name = facts.known_id("swanlab") or secrets.token_hex(8)
        # Online without a key it would ask for one on the terminal.
        without_key = "online" if "SWANLAB_API_KEY" in os.environ else "offline"
        self._run = swanlab.init(
            project=facts.project,
            name=facts.name,
            id=name,
            resume="allow",
            mode=os.environ.get("SWANLAB_MODE", without_key),
            log_dir=str(facts.local("swanlab")),
            config={**facts.config, "versions": dict(facts.versions)},
            # The terminal is the run's, and its lines are in logs/.
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),
        )
        facts.keep_id("swanlab", name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        table = swanlab.echarts.Table()
        table.add(list(COLUMNS), table_rows(step, rows))
        self._run.log({f"samples/{kind}": table}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


track = SwanLab
