"""From requests to scored trajectories, in the order of the requests whatever finishes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.experience import FakeEngine, FakeRewards, prompt
from support.talking import (
    TOKENIZER,
    Echo,
    FakeSessions,
    TalkingEngine,
    asked,
    failed,
    runner,
    said,
)
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.environments.api import Call, Reply, Reset
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.requests import Requests, greedy_sampling
from rlhf3d.experience.scored import ScoredTrajectory
from rlhf3d.rewards.parts import EnvironmentPart
from rlhf3d.rewards.score import Outcome, RewardError, Score
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, written_by

PROMPTS = [prompt(7, 2), prompt(9, 3)]
SAMPLING = SamplingSettings(max_tokens=4)


def seeds(requests: list[Any]) -> list[int]:
    return [request.seed for request in requests]


def test_requests_have_their_own_repeatable_seeds_and_groups() -> None:
    requests = Requests(1, step=2).draw(PROMPTS, 3, SAMPLING)
    assert [request.prompt.index for request in requests] == [7] * 3 + [9] * 3
    assert [request.group for request in requests] == [0] * 3 + [1] * 3
    assert len(set(seeds(requests))) == 6
    assert requests == Requests(1, step=2).draw(PROMPTS, 3, SAMPLING)
    other_step = Requests(1, step=3).draw(PROMPTS, 3, SAMPLING)
    assert not set(seeds(requests)) & set(seeds(other_step))


def test_a_prompt_that_comes_again_gets_new_samples_in_a_group_of_its_own() -> None:
    step = Requests(1, 2)
    first, again = (step.draw(PROMPTS[:1], 2, SAMPLING) for _ in range(2))
    assert len(set(seeds(first + again))) == 4
    assert [one.name for one in first + again] == [f"b2.p7.s{sample}" for sample in range(4)]
    assert [request.group for request in first + again] == [0, 0, 1, 1]
    twice_at_once = Requests(1, 2).draw(PROMPTS[:1] * 2, 2, SAMPLING)
    assert twice_at_once == first + again


def test_environments_of_a_group_begin_alike_and_those_of_others_do_not() -> None:
    """What is drawn from the seed may be the task itself: a group compares answers to one."""
    sessions, step = FakeSessions(), Requests(1, 2)
    requests = [*step.draw([asked(0), asked(1)], 2, SAMPLING), *step.draw([asked(0)], 2, SAMPLING)]
    own = Collector(
        TalkingEngine(["end"]),
        FakeRewards(),  # type: ignore[arg-type]
        TOKENIZER,
        runner=runner(sessions),
        environment=EnvironmentPart(),
    )
    rows = own.collect(requests)
    begun = [session.calls[0].seed for session in sessions.sessions]  # type: ignore[union-attr]
    assert [row.trajectory.group for row in rows] == [0, 0, 1, 1, 2, 2]
    assert begun == [seed for seed in begun[::2] for _ in range(2)] and len(set(begun)) == 3
    assert len(set(seeds(requests))) == 6, "what they sample differs"


class Scripted:
    """Answers of different lengths, the last request's first."""

    def __init__(self, answers: list[Completion]) -> None:
        self.answers = answers

    def submit(self, requests: Any) -> None:
        self.order = [2, 0, 3, 1]

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        number = self.order.pop(0)
        return {number: self.answers[number]}


@pytest.mark.parametrize("made", [0, 2, 4])
def test_the_tokens_that_the_engine_wrote_are_scored_as_text_as_they_come(made: int) -> None:
    """`made`: of so many completions the engine has made the text."""
    tokenizer = make_tiny_tokenizer()
    words, end = ["ab", "c", "de", "fgh"], tokenizer.eos_token_id
    answers = []
    for number, word in enumerate(words):
        ids = (*tokenizer.encode(word), end)
        text = word if number < made else None
        answers.append(Completion(ids, (-0.5,) * len(ids), "stop", written_by(3), text))
    rewards = FakeRewards({1: 0.25, 2: 1.0})
    collector = Collector(Scripted(answers), rewards, tokenizer)  # type: ignore[arg-type]
    rows = collector.collect(Requests(0, 0).draw(PROMPTS, 2, SAMPLING))
    assert [row.text for row in rows] == words
    assert rewards.arrivals == [[2], [0], [3], [1]]
    assert [row.trajectory.rows[0].response_ids.tolist() for row in rows] == [
        list(answer.token_ids) for answer in answers
    ]
    assert [row.reward for row in rows] == [0, 0.25, 1.0, 0]
    item = rewards.items[2]
    assert (item.solution_str, item.ground_truth) == ("de", "9")
    sample = rows[2].sample()
    assert (sample.prompt, sample.response, sample.length) == ("question 9", "de", 3)
    assert (sample.score, sample.policy_version) == (1.0, 3)


def test_requests_of_different_sampling_are_one_collection() -> None:
    engine, rewards = FakeEngine(), FakeRewards({4: 0.5})
    sampled = Requests(0, 0).draw(PROMPTS, 2, SAMPLING)
    greedy = Requests(0, 0).draw(PROMPTS[:1], 1, greedy_sampling(4))
    collector = Collector(engine, rewards, make_tiny_tokenizer())  # type: ignore[arg-type]
    rows = collector.collect([*sampled[:2], *greedy, *sampled[2:]])
    assert [row.trajectory.rows[0].response_ids[0] for row in rows] == [8, 8, 9, 8, 8]
    assert [request.sampling.greedy for request in engine.requests] == [False] * 2 + [True] + [
        False
    ] * 2
    asked = [request for request in engine.requests if not request.sampling.greedy]
    assert asked == [
        Request(r.prompt.prompt_ids, r.seed, SAMPLING, name=f"{r.name}.t0.a0") for r in sampled
    ]
    assert rows[4].reward == 0.5


class Refusing(FakeRewards):
    """Gives up at the first item."""

    def add(self, items: Any) -> None:
        raise RewardError("too many have failed")


def test_nothing_is_left_in_the_engines_when_scoring_gives_up() -> None:
    """The next step's requests have the same numbers: they would get this step's completions."""
    engine = FakeEngine()
    requests = Requests(0, 0).draw(PROMPTS, 2, SAMPLING)
    with pytest.raises(RewardError):
        Collector(engine, Refusing(), make_tiny_tokenizer()).collect(requests)  # type: ignore[arg-type]
    assert engine.unfinished == 0
    sessions, talking = FakeSessions(), TalkingEngine(["end"])
    with pytest.raises(RewardError):
        played(sessions, talking, Refusing(), EnvironmentPart(), count=4)
    assert talking.unfinished == 0 and not sessions.alive


def played(
    sessions: FakeSessions,
    engine: TalkingEngine,
    rewards: FakeRewards,
    part: EnvironmentPart | None = None,
    n: int = 1,
    count: int = 2,
    **config: Any,
) -> list[ScoredTrajectory]:
    """Trajectories of `count` prompts with environments."""
    collector = Collector(
        engine,
        rewards,  # type: ignore[arg-type]
        TOKENIZER,
        runner=runner(sessions, **config),
        environment=part,
    )
    longer = SamplingSettings(max_tokens=100)
    return collector.collect(Requests(0, 0).draw([asked(i) for i in range(count)], n, longer))


class Silent(Echo):
    """An echo that gives no rewards."""

    def __call__(self, call: Call) -> Reply:
        return replace(super().__call__(call), reward=None)


def test_a_conversation_is_scored_by_its_last_turn_with_all_the_rest_at_hand() -> None:
    rewards = FakeRewards({0: 0.5, 1: Score(1.0, Outcome.SCORED, {"answer": 7})})
    rows = played(FakeSessions(Silent), TalkingEngine(["a", "end"], ["end"]), rewards)
    assert [row.reward for row in rows] == [0.5, 1.0]
    item = rewards.items[0]
    assert (item.solution_str, item.ground_truth) == ("end", "0")
    assert [message["content"] for message in item.all_messages] == ["go", "a", "again a", "end"]
    assert item.environment == {"last": "end"}
    sample = rows[0].sample()
    assert (sample.prompt, sample.response, sample.outcome) == ("go", "end", "scored")
    assert sample.transcript == "[assistant] a\n[user] again a\n[assistant] end"
    assert sample.length == rows[0].trajectory.response_length
    assert (sample.answer, rows[1].sample().answer) == (None, "7")


def test_rewards_of_turns_are_weighted_and_stay_on_their_turns() -> None:
    rewards = FakeRewards({0: 0.5, 1: Score(0.0, Outcome.ERROR, message="no")})
    engine = TalkingEngine(["a", "end"])
    rows = played(FakeSessions(), engine, rewards, EnvironmentPart(2.0))
    assert [span.reward for span in rows[0].trajectory.turns] == [0.5, 2.0]
    assert rows[0].reward == 3.0 and rows[0].end_reward == 0.5
    assert rows[0].score.extra["environment"] == 1.25 and rows[0].score.accuracy == 0.5
    assert rows[0].sample().score == 3.0
    # One that could not be scored earns nothing, as a completion of one turn.
    assert rows[1].reward == rows[1].end_reward == 0.0


def test_an_environment_alone_says_what_is_right() -> None:
    engine = TalkingEngine(["end"])
    part = EnvironmentPart(0.5, alone=True)
    rows = played(FakeSessions(), engine, FakeRewards(), part)
    assert [row.reward for row in rows] == [0.5, 0.5]
    assert [row.score.accuracy for row in rows] == [1.0, 1.0]


def test_rewards_and_weights_of_an_environment_go_together() -> None:
    engine = TalkingEngine(["end"])
    with pytest.raises(ValueError, match=r"reward.weights: the environment gives rewards"):
        played(FakeSessions(), engine, FakeRewards())
    with pytest.raises(
        ValueError, match=r"reward.weights has environment.* no reward in any of the 2"
    ):
        played(FakeSessions(Silent), engine, FakeRewards(), EnvironmentPart())
    cut_off = TalkingEngine([said("half", ended=False)])
    unknown = played(FakeSessions(), cut_off, FakeRewards(), EnvironmentPart())
    assert [row.reward for row in unknown] == [0.0, 0.0], "no step was made: nothing is known"
    ignored = played(FakeSessions(), engine, FakeRewards({0: 0.5}), EnvironmentPart(0.0))
    assert [row.reward for row in ignored] == [0.5, 0.0]


def test_a_failed_environment_is_an_outcome_and_no_score() -> None:
    class Breaks(Echo):
        def __call__(self, call: Call) -> Any:
            broken = isinstance(call, Reset) and call.row["index"] == 1
            return failed("no such door") if broken else super().__call__(call)

    rewards = FakeRewards({0: 1.0, 2: 0.25})
    engine = TalkingEngine(["end"])
    part = EnvironmentPart(0.0)
    rows = played(FakeSessions(Breaks), engine, rewards, part, count=3, max_error_rate=0.5)
    assert [row.score.outcome for row in rows] == [
        Outcome.SCORED,
        Outcome.ENV_ERROR,
        Outcome.SCORED,
    ]
    assert [row.score.value for row in rows] == [1.0, 0.0, 0.25]
    assert rewards.left_out == {1} and sorted(rewards.items) == [0, 2]
    assert rows[1].sample().mark == "env_error" and not rows[1].trajectory.rows
