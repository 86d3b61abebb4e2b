"""Trackio: the Space or server that TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names, else a store of
its own in the run's folder, or the one in TRACKIO_DIR.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence

from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.observability.trackers.protocol import COLUMNS, RunFacts, table_rows


class Trackio:
    """See `Tracker`."""

    def __init__(self, facts: RunFacts) -> None:
        # It reads this when it is imported.
        os.environ.setdefault("TRACKIO_DIR", str(facts.local("trackio").resolve()))
        import trackio

        self._table = trackio.Table
        known = facts.known_id("trackio")
        # It finds a run by its name, which two runs in one store may share.
        name = known or f"{facts.name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            project=facts.project,
            name=name,
            resume="never" if known is None else "must",
            config={**facts.config, "versions": dict(facts.versions)},
            embed=False,
            # perf/ has the memory of every rank; here it would be this process's alone.
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        facts.keep_id("trackio", name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        table = self._table(columns=list(COLUMNS), data=table_rows(step, rows))
        self._run.log({f"samples/{kind}": table}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


track = Trackio
