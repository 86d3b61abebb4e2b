"""The trackers by the name that `trainer.logger` has for them.

Invariant: a tracker's library is imported only where it is used; whether it is there is known
before anything starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Literal, get_args

from rlhf3d.observability.trackers.follow import Trackers
from rlhf3d.observability.trackers.protocol import RunFacts, Tracker

TrackerName = Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
"""Each is the module here that has its function `track`, its library, and its extra of pip."""


def missing_libraries(names: Sequence[str]) -> Iterator[str]:
    """A problem for each tracker whose library is not installed."""
    for name in dict.fromkeys(names):
        spec = find_spec(name)
        # A folder that happens to have the name, such as wandb/ with runs, has no origin.
        if spec is None or spec.origin is None:
            yield (
                f"trainer.logger names {name}, which is not installed: "
                f"pip install 'rlhf3d[{name}]', or leave it out"
            )


def open_trackers(
    names: Sequence[str], facts: RunFacts, rows: int, warn: Callable[[str], None]
) -> Trackers:
    """Those named, each on a thread of its own; ValueError where a library is missing.

    `rows`: completions of a step that they are given. `warn` takes what the user should know.
    """
    if problems := list(missing_libraries(names)):
        raise ValueError("\n".join(problems))
    makers = {name: partial(_make, name, facts) for name in names}
    return Trackers(makers, rows, warn)


def _make(name: str, facts: RunFacts) -> Tracker:
    module = importlib.import_module(f"rlhf3d.observability.trackers.{name}")
    tracker: Tracker = module.track(facts)
    return tracker
