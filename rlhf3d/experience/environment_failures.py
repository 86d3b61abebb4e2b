"""What would help where environments failed, by how they did.

Invariant: a key is named only where it would have changed what happened. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlhf3d.rewards.score import Score

_FIXES = {
    "within environment.call_timeout_s": "have the call take less time, or raise "
    "environment.call_timeout_s",
    "environment.trajectory_timeout_s": "have its calls take less time together, or raise "
    "environment.trajectory_timeout_s",
    "environment.max_observation_tokens": "raise environment.max_observation_tokens, or set "
    "environment.overlong_observations=truncate",
    "(out of memory)": "have it need less memory, or raise environment.memory_gib",
    "SIGKILL": "if the machine ran out of memory, lower environment.max_concurrent",
    "": "fix the environment",
}
"""By what the message of a failure ends with; the first that fits."""


def remedy(failures: Sequence[Score]) -> str:
    """What would help, for each way of failing, the most frequent one first."""
    counts = Counter(map(_cause, failures))
    fixes = []
    for cause, count in counts.most_common():
        of = f" ({count} of {len(failures)})" if len(counts) > 1 else ""
        fixes.append(f"{_FIXES[cause]}{of}")
    return (
        f"What helps: {'; '.join(fixes)}. Against failures that pass by themselves, raise "
        "environment.retries or max_error_rate."
    )


def _cause(failure: Score) -> str:
    return next(cause for cause in _FIXES if cause in failure.reason)
