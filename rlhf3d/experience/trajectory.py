"""A trajectory: a prompt, and after it spans of tokens that one author wrote each.

Invariant: every token has an author, and only sampled tokens have a log-probability and a policy
version; each sampled token is sampled in exactly one row; everything else that is said of a
trajectory's tokens is derived from its spans. Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Literal

from rlhf3d.data.dataset import Prompt
from rlhf3d.rollout.api import FinishReason, Versions, check_versions

Author = Literal["sampled", "template", "environment"]
"""Who wrote a span: a policy, the chat template between turns, or the environment's observation."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one author."""

    author: Author
    token_ids: Sequence[int]
    logprobs: Sequence[float] = ()
    """Sampled: log p(token | everything before it) under the sampling distribution, one a token."""
    versions: Versions = ()
    """Sampled: those of the weights that wrote its tokens; a turn stays one span."""
    reward: float = 0.0
    """Sampled: what the environment gave for this turn; it sits on the span's last token."""

    def __post_init__(self) -> None:
        sampled = self.author == "sampled"
        if sampled:
            check_versions(self.versions, len(self.token_ids))
        else:
            assert not self.versions, f"versions of a {self.author} span"
        expected = len(self.token_ids) if sampled else 0
        assert len(self.logprobs) == expected, (
            f"{len(self.logprobs)} log-probs of {len(self.token_ids)} {self.author} tokens"
        )
        assert sampled or not self.reward, f"a reward of a {self.author} span"


@dataclass(frozen=True)
class Row:
    """One row of the batch: a prompt that an engine read, and what was appended to it."""

    prompt_ids: Sequence[int]
    """[P] for a trajectory's later rows the conversation so far, as the template renders it anew:
    what the policy sampled of it is trained on in the rows before."""
    spans: tuple[Span, ...]
    """The response, in order."""

    @property
    def response_ids(self) -> array[int]:
        """[R] every token after the prompt."""
        # Arrays, here and below: a list would hold an object for each of a step's tokens.
        ids = array("i")
        for span in self.spans:
            ids.extend(span.token_ids)
        return ids

    @property
    def response_mask(self) -> array[int]:
        """[R] 1 for sampled tokens, which are trained on, 0 for the others."""
        mask = array("b")
        for span in self.spans:
            # One byte a token, 0 or 1, without a loop over tokens.
            mask.frombytes(bytes([span.author == "sampled"]) * len(span.token_ids))
        return mask

    @property
    def logprobs(self) -> array[float]:
        """[R] log-probability of each sampled token, 0 for the others."""
        logprobs = array("f")
        for span in self.spans:
            logprobs.extend(span.logprobs or [0.0] * len(span.token_ids))
        return logprobs

    @property
    def turn_rewards(self) -> array[float]:
        """[R] each turn's reward on its last token, 0 elsewhere; a turn without tokens has none."""
        rewards = array("f")
        for span in self.spans:
            rewards.extend([0.0] * len(span.token_ids))
            if span.reward and span.token_ids:
                rewards[-1] = span.reward
        return rewards

    @property
    def response_length(self) -> int:
        """R: tokens after the prompt, of every author."""
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def turns(self) -> Iterator[Span]:
        """The sampled spans."""
        return (span for span in self.spans if span.author == "sampled")


@dataclass(frozen=True)
class Trajectory:
    """What became of one prompt, once."""

    prompt: Prompt
    group: int
    """Which drawing of the prompt: those of one group are compared with each other."""
    rows: tuple[Row, ...]
    """In order; several where the chat template did not keep what was written before."""
    finish_reason: FinishReason
    """Of the last turn."""
    name: str = ""
    """See `TrajectoryRequest.name`."""

    @cached_property
    def turns(self) -> tuple[Span, ...]:
        """The sampled spans of all rows, in order: one a turn."""
        return tuple(chain.from_iterable(row.turns for row in self.rows))

    @property
    def response_length(self) -> int:
        """Tokens after the prompts of its rows, of every author."""
        return sum(row.response_length for row in self.rows)

    @property
    def sampled_length(self) -> int:
        """Tokens that the policy wrote."""
        return sum(len(span.token_ids) for span in self.turns)

    @property
    def turn_reward(self) -> float:
        """What the environment gave for all turns together."""
        return sum(span.reward for span in self.turns)

    def with_turn_rewards(self, weight: float) -> Trajectory:
        """The same with the rewards of its turns multiplied."""
        rows = []
        for row in self.rows:
            spans = tuple(replace(span, reward=span.reward * weight) for span in row.spans)
            rows.append(replace(row, spans=spans))
        return replace(self, rows=tuple(rows))

    @property
    def oldest_version(self) -> int:
        """The oldest policy that wrote a part of it."""
        return min(self._versions())

    @property
    def newest_version(self) -> int:
        """The newest policy that wrote a part of it."""
        return max(self._versions())

    def _versions(self) -> list[int]:
        # A span without tokens counts: the policy chose to end there.
        versions: list[int] = []
        for span in self.turns:
            versions += [version for _, version in span.versions]
        return versions
