"""The plan of a run, from the configuration in its own folder.

Invariant: nothing of the user's is executed.
"""

from __future__ import annotations

from pathlib import Path

from rlhf3d.config.load import load_config
from rlhf3d.config.schema import Config
from rlhf3d.observability.live.state import MemoryPlanned
from rlhf3d.planning.plan import find_cluster, find_spec, make_plan
from rlhf3d.units import GIB


def planned_memory(file: Path) -> MemoryPlanned | None:
    """What a configuration's run needs with the longest sequences; None where there is no plan."""
    try:
        config = plannable(file)
        spec, _ = find_spec(config.model.path)
        memory = make_plan(config, spec, find_cluster(config.cluster, None)).memory
    except ValueError:
        return None
    _, peak = memory.peak
    return MemoryPlanned(peak.total / GIB, memory.host.total / GIB)


def plannable(file: Path) -> Config:
    """The configuration in a file; ValueError where no plan can be made of it."""
    config = load_config(file)
    if config.algorithm.custom_path is not None:
        raise ValueError("what an estimator of one's own needs is known only when its file is run")
    return config
