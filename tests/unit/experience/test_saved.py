"""Trajectories ahead of the training come back from files as they went in."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.experience import prompt

from rlhf3d.checkpoints.inspection import inspect
from rlhf3d.checkpoints.manifest import Manifest, infos_below, write_manifest
from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.episode import ENDS, EpisodeRecord
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.experience.saved import (
    TOKENS_FILE,
    TRAJECTORIES_FILE,
    Queued,
    QueuedBatch,
    load_queue,
    save_queue,
)
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import FinishReason, SamplingSettings
from rlhf3d.tokenizer.turns import RESTART_KINDS

PROMPTS = {number: prompt(number, length=3) for number in (0, 7, 2**31)}
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=4)
FLOATS = st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
RECORDS = st.dictionaries(st.text(max_size=4), JSON, max_size=3)


@st.composite
def versions(draw: st.DrawFn, length: int) -> tuple[tuple[int, int], ...]:
    """One or several stretches; of a span without tokens one."""
    starts = [0]
    if length > 1:
        starts += sorted(draw(st.sets(st.integers(1, length - 1), max_size=2)))
    first = draw(st.integers(0, 2**40))
    return tuple((start, first + number) for number, start in enumerate(starts))


@st.composite
def spans(draw: st.DrawFn) -> Span:
    tokens, author = draw(TOKENS), draw(st.sampled_from(["sampled", "template", "environment"]))
    if author != "sampled":
        return Span(author, array("i", tokens))  # type: ignore[arg-type]
    logprobs = [draw(st.floats(width=32)) for _ in tokens]
    # As engines return them, or as a tuple.
    made: Sequence[float] = array("f", logprobs) if draw(st.booleans()) else tuple(logprobs)
    return Span("sampled", tokens, made, draw(versions(len(tokens))), draw(FLOATS))


@st.composite
def rows(draw: st.DrawFn, own: Prompt) -> Row:
    ids: Sequence[int] = own.prompt_ids
    if draw(st.booleans()):
        ids = array("i", draw(TOKENS))
    return Row(ids, tuple(draw(st.lists(spans(), max_size=4))))


EPISODES = st.builds(
    EpisodeRecord,
    messages=st.lists(RECORDS, max_size=2).map(tuple),
    first_turn=st.integers(0, 3),
    begun=st.text(max_size=4),
    record=RECORDS,
    end=st.sampled_from(ENDS),
    rewarded=st.booleans(),
    tool_calls=st.dictionaries(st.text(max_size=4), st.integers(0)),
    observation_tokens=st.integers(0),
    truncated=st.integers(0),
    prompt_truncated=st.booleans(),
    restarts=st.lists(st.sampled_from(RESTART_KINDS), max_size=2).map(tuple),
    calls_s=st.lists(FLOATS, max_size=2).map(tuple),
    retries=st.integers(0),
)


@st.composite
def scored(draw: st.DrawFn) -> ScoredTrajectory:
    own = draw(st.sampled_from(list(PROMPTS.values())))
    trajectory = Trajectory(
        own,
        draw(st.integers(0, 2**40)),
        tuple(draw(st.lists(rows(own), max_size=3))),
        draw(st.sampled_from(get_args(FinishReason))),
        draw(st.text(max_size=4)),
    )
    score = Score(
        draw(FLOATS), draw(st.sampled_from(Outcome)), draw(RECORDS), draw(st.none() | st.text())
    )
    greedy, episode = draw(st.none() | FLOATS), draw(st.none() | EPISODES)
    return ScoredTrajectory(trajectory, draw(st.text()), score, draw(FLOATS), greedy, episode)


SCORED = st.lists(scored(), max_size=3)
BATCHES = st.builds(
    QueuedBatch,
    st.integers(0),
    st.integers(0),
    st.builds(
        Experience,
        SCORED,
        st.dictionaries(st.text(max_size=4), FLOATS),
        SCORED,
        st.lists(st.integers(0), max_size=2),
    ),
)
REQUESTS = st.builds(
    TrajectoryRequest,
    st.sampled_from(list(PROMPTS.values())),
    st.integers(0),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.builds(
        SamplingSettings,
        temperature=st.floats(0.1, 2),
        top_k=st.integers(-1),
        max_tokens=st.integers(1),
        greedy=st.booleans(),
        stop_token_ids=st.lists(st.integers(0), max_size=2).map(tuple),
    ),
)
QUEUES = st.builds(
    Queued, st.lists(BATCHES, max_size=2).map(tuple), st.lists(REQUESTS, max_size=2).map(tuple)
)


def exact(value: Any) -> Any:
    """`value` for a comparison in which NaN is itself and -0.0 is not 0."""
    if isinstance(value, Span):
        logprobs = array("f", value.logprobs).tobytes()
        return (value.author, list(value.token_ids), logprobs, value.versions, exact(value.reward))
    if isinstance(value, Row):
        return list(value.prompt_ids), exact(value.spans)
    if isinstance(value, float | Prompt):
        return repr(value)
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: exact(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


@given(QUEUES)
def test_what_is_loaded_is_what_was_saved(queue: Queued) -> None:
    with TemporaryDirectory() as folder:
        save_queue(Path(folder) / "experience", queue)
        loaded = load_queue(Path(folder) / "experience", PROMPTS.__getitem__)
    assert exact(loaded) == exact(queue)
    for batch in loaded.batches:
        for one in (*batch.experience.trajectories, *batch.experience.left_out):
            number = one.trajectory.prompt.index
            assert one.trajectory.prompt is PROMPTS[number], "shared by all of its trajectories"


def trajectory(logprobs: Sequence[float], **changes: Any) -> ScoredTrajectory:
    asked = PROMPTS[7]
    span = Span("sampled", (5,) * len(logprobs), logprobs, ((0, 3),), 0.25)
    made = Trajectory(asked, 0, (Row(asked.prompt_ids, (span,)),), "stop")
    return replace(ScoredTrajectory(made, "text", Score(1.0, Outcome.SCORED), 1.5), **changes)


def queue_of(*trajectories: ScoredTrajectory) -> Queued:
    return Queued((QueuedBatch(4, 2, Experience(trajectories)),))


def test_every_bit_of_a_log_prob_is_kept(tmp_path: Path) -> None:
    """Also which NaN it is."""
    bits = array("i", [0x7FC01234, -0x80000000, 1, 0x7F800000])
    save_queue(tmp_path / "q", queue_of(trajectory(array("f", bits.tobytes()))))
    (batch,) = load_queue(tmp_path / "q", PROMPTS.__getitem__).batches
    (one,) = batch.experience.trajectories
    assert array("i", array("f", one.trajectory.turns[0].logprobs).tobytes()) == bits


def test_the_batch_to_train_on_is_the_same(tmp_path: Path) -> None:
    queue = queue_of(trajectory((-0.5, -1.0)), trajectory((-0.25,), greedy_reward=None))
    save_queue(tmp_path / "q", queue)
    saved, loaded = queue.batches[0], load_queue(tmp_path / "q", PROMPTS.__getitem__).batches[0]
    before, after = (one.experience.batch(pad_id=0).columns for one in (saved, loaded))
    assert before.keys() == after.keys() and "turn_rewards" in after
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_json_does_not_have_is_kept_as_text(tmp_path: Path) -> None:
    extra: Any = {"pair": (1, 2), "path": Path("x"), 3: {4: None}}
    save_queue(tmp_path / "q", queue_of(trajectory((), score=Score(1.0, Outcome.SCORED, extra))))
    (batch,) = load_queue(tmp_path / "q", PROMPTS.__getitem__).batches
    kept = batch.experience.trajectories[0].score.extra
    assert kept == {"pair": [1, 2], "path": "x", "3": {"4": None}}


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    save_queue(tmp_path / "q", queue_of(trajectory((-1.0,))))
    same = PROMPTS[7]
    others = [
        replace(same, prompt_ids=(4, 4)),
        replace(same, ground_truth=7),
        replace(same, data_source="other"),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"row 7 of data\.train_files"):
            load_queue(tmp_path / "q", {7: other}.__getitem__)
    # Texts and numbers that only people read may differ.
    load_queue(tmp_path / "q", {7: replace(same, text="other words")}.__getitem__)


@pytest.mark.parametrize("file", ["queue.json", TRAJECTORIES_FILE, TOKENS_FILE])
def test_what_is_no_such_folder_is_named(file: str, tmp_path: Path) -> None:
    save_queue(tmp_path / "q", queue_of(trajectory((-1.0,)), trajectory((-2.0,))))
    damaged = tmp_path / "q" / file
    text = damaged.read_bytes()
    # Without the last line, and without the file.
    damaged.write_bytes(text[: text.rstrip().rfind(b"\n") + 1])
    with pytest.raises(ValueError, match=str(tmp_path / "q")):
        load_queue(tmp_path / "q", PROMPTS.__getitem__)
    damaged.unlink()
    with pytest.raises(ValueError, match=str(tmp_path / "q")):
        load_queue(tmp_path / "q", PROMPTS.__getitem__)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    save_queue(tmp_path / "q", Queued())
    file = tmp_path / "q" / "queue.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2"):
        load_queue(tmp_path / "q", PROMPTS.__getitem__)


def test_inspect_counts_what_is_ahead(tmp_path: Path) -> None:
    request = TrajectoryRequest(PROMPTS[0], 0, 1, 1, SamplingSettings())
    ahead = queue_of(trajectory((-1.0,)), trajectory(()))
    save_queue(tmp_path / "experience", replace(ahead, requests=(request,) * 3))
    manifest = Manifest(3, 3, (), optimizer=False, files=infos_below(tmp_path, {}))
    write_manifest(tmp_path, manifest)
    found = inspect(tmp_path)
    assert found["ahead"] == {"batches": 1, "trajectories": 2, "unfinished": 3}
    assert found["problems"] == []
