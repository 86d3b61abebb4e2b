"""Trackio: the Space or server that TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names, else a store of
its own in the run's folder, or the one in TRACKIO_DIR.
"""

from __future__ import annotations

import os
import secrets

from rlhf3d.observability.trackers.protocol import RunFacts, TableRun


class Trackio(TableRun):
    """See `Tracker`."""

    def __init__(self, facts: RunFacts) -> None:
        # It reads this when it is imported.
        os.environ.setdefault("TRACKIO_DIR", str(facts.local("trackio").resolve()))
        import trackio

        known = facts.known_id("trackio")
        # It finds a run by its name, which two runs in one store may share.
        name = known or f"{facts.name}-{secrets.token_hex(4)}"
        run = trackio.init(
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
        super().__init__(run, trackio.Table)


track = Trackio
