"""Who wrote which token of a step, with the log-probs of the engine and of Megatron.

Invariant: authors are those of the trajectory's spans, and log-probs those of the batch that the
models train on: nothing is computed again.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf3d.batching.batch import Batch
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.trajectory import Row
from rlhf3d.observability.tokens import TokenSpan, TrajectoryTokens, rounded
from rlhf3d.tokenizer.pieces import pieces


@dataclass(frozen=True)
class TokenRecorder:
    """Records the first trajectories of a step."""

    tokenizer: Any
    count: int
    """How many of each step."""

    def records(self, experience: Experience, batch: Batch, version: int) -> list[TrajectoryTokens]:
        """Of the step's trajectories; `batch`: their rows, with the column old_logprobs.

        `version`: of the policy that is trained, whose log-probs these are.
        """
        # The same tensor object in bypass mode: then Megatron computed none.
        computed = batch["old_logprobs"] is not batch["rollout_logprobs"]
        records, index = [], 0
        for number, scored in enumerate(experience.trajectories[: self.count]):
            rows = []
            # The rows of a trajectory follow one another, in the batch as here.
            for row in scored.trajectory.rows:
                old = batch["old_logprobs"][index].tolist() if computed else None
                rows.append(self._spans(row, old))
                index += 1
            records.append(_record(number, scored, rows, version))
        return records

    def _spans(self, row: Row, old_logprobs: Sequence[float] | None) -> list[TokenSpan]:
        """`old_logprobs`: of the row's response tokens, padded."""
        # Of all tokens: a character may be begun by one author and ended by another.
        texts = pieces(self.tokenizer, [*row.prompt_ids, *row.response_ids])
        start = len(row.prompt_ids)
        spans = [TokenSpan("prompt", list(row.prompt_ids), texts[:start])]
        for span in row.spans:
            end = start + len(span.token_ids)
            own = TokenSpan(
                span.author,
                list(span.token_ids),
                texts[start:end],
                span.versions,
                span.reward,
                rounded(span.logprobs),
            )
            if old_logprobs is not None and span.author == "sampled":
                begin = start - len(row.prompt_ids)
                old = old_logprobs[begin : begin + len(span.token_ids)]
                own = replace(own, old_logprobs=rounded(old))
            spans.append(own)
            start = end
        return spans


def _record(
    number: int, scored: ScoredTrajectory, rows: Sequence[Sequence[TokenSpan]], version: int
) -> TrajectoryTokens:
    trajectory = scored.trajectory
    return TrajectoryTokens(
        number,
        trajectory.group,
        trajectory.prompt.data_source,
        scored.score.value,
        scored.score.outcome.value,
        trajectory.finish_reason,
        rows,
        version,
    )
