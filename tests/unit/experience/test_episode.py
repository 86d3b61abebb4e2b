"""One trajectory with an environment: what comes after what, and how limits end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.talking import END, TOKENIZER, TURNS, Echo, asked, rules, said

from rlhf3d.environments.api import Finish, Reply, Reset, Step
from rlhf3d.experience.episode import Episode, EpisodeRecord, OverlongObservation, Rules
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, turn_seed
from rlhf3d.tokenizer.chat import tokenize

RULES = rules()
SAMPLING = SamplingSettings(temperature=0.5, max_tokens=200)


def episode(max_tokens: int = 200, rules: Rules = RULES, **prompt: Any) -> Episode:
    own = replace(asked(3), **prompt)
    request = TrajectoryRequest(own, 0, 77, 78, replace(SAMPLING, max_tokens=max_tokens), "b1")
    return Episode(request, 5, rules)


def play(running: Episode, *turns: Completion) -> tuple[EpisodeRecord, list[Request]]:
    """Run to the end with an echo; what is known then, and what engines were asked."""
    environment, waiting, requests = Echo(), list(turns), []
    action: Any = running.start()
    while not isinstance(action, EpisodeRecord):
        if isinstance(action, Request):
            requests.append(action)
            action = running.wrote(waiting.pop(0))
        else:
            action = running.replied(environment(action))
    assert not waiting
    return action, requests


def text(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids)))


def test_turns_follow_each_other_until_the_environment_ends_it() -> None:
    made = episode()
    record, requests = play(made, said("a"), said("b"), said("end"))
    trajectory = made.trajectory()
    (row,) = trajectory.rows
    assert [span.author for span in row.spans].count("sampled") == 3
    assert [span.reward for span in trajectory.turns] == [0.25, 0.25, 1.0]
    assert trajectory.finish_reason == "stop" and record.end == "done"
    # What was sampled and appended is what the template renders of the conversation.
    whole = tokenize(TOKENIZER, record.messages[:-1])
    assert [*row.prompt_ids, *row.response_ids] == [*whole, *said("end").token_ids]
    assert record.messages == (
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "again a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "again b"},
        {"role": "assistant", "content": "end"},
    )
    assert (record.record, record.rewarded) == ({"last": "end"}, True)
    observed = "".join(text(s.token_ids) for s in row.spans if s.author == "environment")
    assert observed == "again aagain b" and record.observation_tokens == len(observed)
    seeds = [request.seed for request in requests]
    assert seeds == [77, turn_seed(77, 1), turn_seed(77, 2)] and len(set(seeds)) == 3
    assert [request.name for request in requests] == ["b1.t0.a0", "b1.t1.a0", "b1.t2.a0"]
    assert trajectory.name == "b1"
    # Each turn is asked for with what is left, and all on the engine that has the prefix.
    taken = 0
    for request, span in zip(requests, trajectory.turns, strict=True):
        prefix = [*row.prompt_ids, *row.response_ids][: len(request.prompt_ids)]
        assert list(request.prompt_ids) == prefix
        taken = len(request.prompt_ids) - len(row.prompt_ids)
        assert request.sampling == replace(SAMPLING, max_tokens=200 - taken)
        assert request.affinity == 5 and span.versions == ((0, 1),)


def test_the_first_call_has_the_row_and_the_seed() -> None:
    prompt = asked(3)
    assert episode().start() == Reset(dict(prompt.columns), 78)


def test_a_turn_that_is_cut_off_ends_it_without_a_step() -> None:
    made = episode()
    action = made.replied(Echo()(made.start()))
    assert isinstance(action, Request)
    assert made.wrote(said("half a w", ended=False)) == Finish()
    record = made.replied(Reply(done=True, reward=0.5))
    assert isinstance(record, EpisodeRecord) and record.end == "length"
    trajectory = made.trajectory()
    assert trajectory.finish_reason == "length"
    assert [span.reward for span in trajectory.turns] == [0.5], "what its end is worth"


def test_the_last_turn_that_is_allowed_is_still_a_step() -> None:
    made = episode(rules=rules(max_turns=2))
    calls = []
    action: Any = made.start()
    for turn in (said("a"), said("b")):
        calls.append(action)
        assert isinstance(made.replied(Echo()(action)), Request)
        action = made.wrote(turn)
    assert action == Step("b")
    assert made.replied(Echo()(action)) == Finish()
    record = made.replied(Reply(done=True, reward=0.5))
    assert isinstance(record, EpisodeRecord) and record.end == "max_turns"
    trajectory = made.trajectory()
    assert [span.reward for span in trajectory.turns] == [0.25, 0.75], "its step's and its end's"
    assert trajectory.finish_reason == "stop"
    assert trajectory.rows[0].spans[-1].author == "sampled", "nobody reads the last observation"


def test_no_room_for_a_turn_ends_it() -> None:
    """With one token fewer than the turn, the observation and the template's text need."""
    made = episode()
    _, requests = play(made, said("a"), said("end"))
    needed = len(requests[1].prompt_ids) - len(requests[0].prompt_ids)
    ended = episode(max_tokens=needed)
    record, asked_for = play(ended, said("a"))
    assert record.end == "length" and len(asked_for) == 1
    (row,) = ended.trajectory().rows
    assert [span.author for span in row.spans] == ["sampled"], "nothing hangs after it"
    just = episode(max_tokens=needed + 1)
    _, asked_for = play(just, said("a"), said("", ended=True))
    assert [request.sampling.max_tokens for request in asked_for] == [needed + 1, 1]


def test_turns_have_a_limit_of_their_own() -> None:
    _, requests = play(episode(rules=rules(max_turn_tokens=7)), said("end"))
    assert requests[0].sampling.max_tokens == 7


def test_long_observations_are_cut_or_refused() -> None:
    cut = episode(rules=rules(max_observation_tokens=9))
    record, _ = play(cut, said("abcdefg"), said("end"))
    assert record.messages[2]["content"] == "again abc"
    assert (record.truncated, record.observation_tokens) == (1, 9)
    refused = rules(max_observation_tokens=9, overlong_observations="error")
    with pytest.raises(OverlongObservation, match="max_observation_tokens = 9"):
        play(episode(rules=refused), said("abcdefg"), said("end"))
    record, _ = play(episode(rules=refused), said("abc"), said("end"))
    assert record.truncated == 0


def test_a_first_prompt_that_its_reset_made_too_long_names_the_row() -> None:
    made = episode(rules=rules(max_prompt_length=30))
    longer = ({"role": "user", "content": "go" * 20},)
    with pytest.raises(ValueError, match=r"max_prompt_length = 30: the prompt of row 3 .* tokens"):
        made.replied(Reply(prompt=longer))


def test_a_prompt_that_the_data_set_cut_stays_cut() -> None:
    made = episode(prompt_ids=asked(3).prompt_ids[4:])
    _, requests = play(made, said("a"), said("end"))
    assert list(requests[0].prompt_ids) == list(asked(3).prompt_ids[4:])
    assert list(requests[1].prompt_ids)[: len(requests[0].prompt_ids)] == list(
        requests[0].prompt_ids
    )


class Restarts:
    """A template that begins each turn anew, as one that strips what the model thought."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def __getattr__(self, name: str) -> Any:
        return getattr(TURNS, name)

    def append(self, context: Any, ids: Any, messages: Any) -> Any:
        from rlhf3d.tokenizer.turns import Restarted

        appended = TURNS.append(context, ids, messages)
        return Restarted(TURNS.begin(appended.context.messages), "answer", "test")


def restarting(max_prompt_length: int = 64) -> Rules:
    plain = rules(max_prompt_length)
    return replace(plain, turns=Restarts(plain))  # type: ignore[arg-type]


def test_a_row_that_begins_anew_is_a_row_of_the_same_trajectory() -> None:
    made = episode(rules=restarting())
    record, requests = play(made, said("a"), said("b"), said("end"))
    rows = made.trajectory().rows
    assert [len(row.spans) for row in rows] == [1, 1, 1]
    assert [list(row.prompt_ids) for row in rows] == [list(r.prompt_ids) for r in requests]
    assert [span.reward for span in made.trajectory().turns] == [0.25, 0.25, 1.0]
    assert len(record.messages) == 6 and record.restarts == ("answer", "answer")
    # What was written counts, two tokens a turn, and what a row may hold with its prompt.
    last = 64 + 200 - len(requests[2].prompt_ids)
    assert last < 196
    assert [request.sampling.max_tokens for request in requests] == [200, 198, last]


def test_a_row_that_begins_anew_fits_a_batch() -> None:
    """Prompt and response together; a row without a turn is left off."""
    made = episode(max_tokens=10, rules=restarting(max_prompt_length=40))
    record, requests = play(made, said("a"))
    assert record.end == "length" and len(made.trajectory().rows) == 1
    assert len(requests) == 1 and record.restarts == ()


def test_the_assistants_words_in_the_prompt_are_gone_on_with() -> None:
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "I"}]
    ids = tokenize(TOKENIZER, messages)
    made = episode(prompt_ids=ids, messages=messages, columns={"prompt": messages})
    record, _ = play(made, said(" say"), said("end"))
    assert (
        record.messages[1] == {"role": "assistant", "content": "I say"} and record.first_turn == 1
    )


def test_tool_calls_add_up() -> None:
    made = episode()
    made.replied(Echo()(made.start()))
    made.wrote(said("x"))
    made.replied(Reply(({"role": "user", "content": "r"},), tool_calls={"right": 2, "wrong": 1}))
    made.wrote(said("y"))
    record = made.replied(Reply(done=True, tool_calls={"right": 1}))
    assert isinstance(record, EpisodeRecord) and record.tool_calls == {"right": 3, "wrong": 1}
    assert not record.rewarded and END in made.last_turn
