"""What a process did in a profiled step, as plain values.

Invariant: times are ns on the monotonic clock of the process's machine; nothing ends before it
begins. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "phase",
    "call",
    "schedule",
    "forward",
    "backward",
    "optimizer",
    "collective",
    "wait",
    "transfer",
    "prefill",
    "decode",
    "command",
]
"""phase: of the driver; call: of a training rank, for a phase; schedule: the pipeline's, of one
mini-batch, in which forward, backward and waits are; collective: with ranks of other replicas or
stages; wait: for another process; transfer: weights under way; prefill, decode: an engine's step;
command: what an engine does between two of its steps."""


@dataclass(frozen=True)
class Span:
    """Something that took time."""

    name: str
    kind: Kind
    began: int
    ended: int
    details: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and short texts."""


@dataclass(frozen=True)
class RequestLife:
    """One request in its engine; what was before the profile counts from its start."""

    number: int
    submitted: int
    first_token: int | None
    ended: int | None
    """None for one that goes on after the profile."""
    prompt_tokens: int
    tokens: int
    """That the engine gave, as far as the profile goes."""
    aborted: bool = False


@dataclass(frozen=True)
class Record:
    """All that one process recorded."""

    machine: str
    """Whose clock the times are of."""
    spans: tuple[Span, ...]
    requests: tuple[RequestLife, ...] = ()
