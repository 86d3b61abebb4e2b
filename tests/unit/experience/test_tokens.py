"""Each token of the batch is recorded once, under its author, with its own log-probs."""

from __future__ import annotations

import torch
from support.experience import prompt
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.tokens import TokenRecorder
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import written_by

TOKENIZER = make_tiny_tokenizer(512)
RECORDER = TokenRecorder(TOKENIZER, 2)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def said(text: str, version: int, reward: float = 0.0) -> Span:
    """Log-probs -1, -2, …"""
    logprobs = [-1.0 - place for place in range(len(text))]
    return Span("sampled", ids(text), logprobs, written_by(version), reward)


def scored(group: int, *rows: Row) -> ScoredTrajectory:
    trajectory = Trajectory(prompt(group), group, rows, "stop")
    return ScoredTrajectory(trajectory, "", Score(1.0, Outcome.SCORED), 1.0)


EXPERIENCE = Experience(
    [
        scored(
            5,
            Row(
                ids("ask"),
                (
                    said("go", 3, 0.5),
                    Span("template", ids("/")),
                    Span("environment", ids("saw")),
                    said("it", 4),
                ),
            ),
            Row(ids("again"), (said("x", 4),)),
        ),
        scored(6, Row(ids("b"), (said("yes", 3),))),
        scored(7, Row(ids("b"), (said("no", 3),))),
    ]
)


def test_each_token_has_its_author_and_its_own_log_probs() -> None:
    """Megatron's log-probs of row i, token j are -(10 i + j)."""
    batch = EXPERIENCE.batch(pad_id=0)
    old = -(10.0 * torch.arange(4)[:, None] + torch.arange(8))
    assert batch["rollout_logprobs"].shape == old.shape
    first, second = RECORDER.records(EXPERIENCE, batch.with_columns(old_logprobs=old), 4)
    assert first.trained_version == 4
    assert (first.number, first.group, second.number, second.group) == (0, 5, 1, 6)
    shown = [[(s.author, "".join(s.texts), s.versions) for s in row] for row in first.rows]
    assert shown == [
        [
            ("prompt", "ask", ()),
            ("sampled", "go", ((0, 3),)),
            ("template", "/", ()),
            ("environment", "saw", ()),
            ("sampled", "it", ((0, 4),)),
        ],
        [("prompt", "again", ()), ("sampled", "x", ((0, 4),))],
    ]
    spans = first.spans
    assert spans[1].rollout_logprobs == [-1, -2] and spans[1].reward == 0.5
    # After "go/saw": the seventh and eighth token of the response.
    assert [span.old_logprobs for span in spans] == [
        None,
        [0, -1],
        None,
        None,
        [-6, -7],
        None,
        [-10],
    ]
    # The second trajectory's row is the batch's third.
    assert second.spans[1].old_logprobs == [-20, -21, -22]
    assert second.spans[1].token_ids == ids("yes")


def test_in_bypass_mode_megatron_has_computed_none() -> None:
    batch = EXPERIENCE.batch(pad_id=0)
    batch = batch.with_columns(old_logprobs=batch["rollout_logprobs"])
    found = RECORDER.records(EXPERIENCE, batch, 4)
    assert found[0].spans[1].old_logprobs is None and not found[0].differences
