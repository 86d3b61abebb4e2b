"""Who wrote which token: the first trajectories of a step in `samples/tokens_step_N.jsonl`.

Invariant: a file is complete when it has its name; its tokens are those that were trained on, in
order, each once and with its author.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf3d.observability.samples import SAMPLES_DIR, TOKENS, files_of, read_objects, spaced
from rlhf3d.observability.whole_file import whole_file

_DIGITS = 5
"""Decimals of a log-probability in the file."""
STEPS_READ = 60
"""Files that are read to look at a whole run, evenly over it: more say the same."""


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of one author."""

    author: str
    """prompt, sampled, template or environment."""
    token_ids: Sequence[int]
    texts: Sequence[str]
    """What each token stands for; see `tokenizer/pieces.py`."""
    versions: Sequence[Sequence[int]] = ()
    """Sampled: (first token, policy) of each stretch that one policy wrote."""
    reward: float = 0.0
    """Sampled: what the environment gave for the turn."""
    rollout_logprobs: Sequence[float | None] = field(default_factory=list)
    """Sampled: the engine's log-probability of each token; None where that is no finite number."""
    old_logprobs: Sequence[float | None] | None = None
    """Sampled: Megatron's, before the update; None in bypass mode, which computes none."""

    @property
    def differences(self) -> list[float | None]:
        """|Difference of the two log-probs| of each token, nats; None without both.

        Infinite where both were computed and one is no finite number.
        """
        if self.old_logprobs is None:
            return [None] * len(self.token_ids)
        pairs = zip(self.rollout_logprobs, self.old_logprobs, strict=True)
        return [_difference(engine, trained) for engine, trained in pairs]


@dataclass(frozen=True)
class TrajectoryTokens:
    """All tokens of one trajectory."""

    number: int
    """Its place among the step's samples, from 0."""
    group: int
    data_source: str
    score: float
    outcome: str
    finish_reason: str
    rows: Sequence[Sequence[TokenSpan]]
    """Of each row of the batch: its prompt, then what was appended to it."""
    trained_version: int | None = None
    """Of the policy that was trained, before its update; None in files of earlier versions."""

    @property
    def spans(self) -> list[TokenSpan]:
        """Of all rows, in order."""
        spans: list[TokenSpan] = []
        for row in self.rows:
            spans += row
        return spans

    @property
    def differences(self) -> list[float]:
        """`TokenSpan.differences` of all tokens that have one."""
        found: list[float] = []
        for span in self.spans:
            found += [difference for difference in span.differences if difference is not None]
        return found

    @property
    def largest_difference(self) -> float:
        """-1 without any."""
        return max(self.differences, default=-1.0)

    def tokens_of(self, author: str) -> int:
        """How many tokens that author wrote."""
        return sum(len(span.token_ids) for span in self.spans if span.author == author)


def rounded(logprobs: Iterable[float]) -> list[float | None]:
    """As the file holds them: JSON has no NaN and no infinity."""
    return [round(value, _DIGITS) if math.isfinite(value) else None for value in logprobs]


def tokens_path(output_dir: str | Path, step: int) -> Path:
    """`samples/tokens_step_N.jsonl`."""
    return Path(output_dir) / SAMPLES_DIR / f"{TOKENS}step_{step}.jsonl"


def write_tokens(
    output_dir: str | Path, step: int, trajectories: Iterable[TrajectoryTokens]
) -> Path:
    """Write (or replace, after a resume) one step's file; returns it."""
    path = tokens_path(output_dir, step)
    with whole_file(path) as file:
        file.writelines(json.dumps(asdict(one)) + "\n" for one in trajectories)
    return path


def read_tokens(path: str | Path) -> list[TrajectoryTokens]:
    """The trajectories of one file, in the order written."""
    return read_objects(path, _trajectory)


def token_steps(output_dir: str | Path) -> list[int]:
    """The steps that have a file, ascending."""
    return list(files_of(output_dir, TOKENS))


def read_steps(output_dir: str | Path) -> list[tuple[int, list[TrajectoryTokens]]]:
    """The trajectories of each step that has a file, of a long run of `STEPS_READ` of them."""
    steps = spaced(token_steps(output_dir), STEPS_READ)
    return [(step, read_tokens(tokens_path(output_dir, step))) for step in steps]


def _trajectory(fields: Mapping[str, Any]) -> TrajectoryTokens:
    rows = [_spans(row) for row in fields["rows"]]
    return TrajectoryTokens(**{**fields, "rows": rows})


def _spans(row: Sequence[Mapping[str, Any]]) -> list[TokenSpan]:
    return [_span(dict(span)) for span in row]


def _span(fields: dict[str, Any]) -> TokenSpan:
    # As tuples, which JSON does not have. Older files have one policy for a span.
    policy = fields.pop("policy_version", None)
    versions = fields.pop("versions", [] if policy is None else [[0, policy]])
    return TokenSpan(versions=tuple(tuple(stretch) for stretch in versions), **fields)


def _difference(engine: float | None, trained: float | None) -> float:
    if engine is None or trained is None:
        return math.inf
    return abs(engine - trained)
