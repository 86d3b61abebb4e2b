"""Sources of experience: on-policy generation, and dynamic sampling around another source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.experience import FakeEngine, FakeRewards, in_groups, prompt, row
from support.talking import (
    TOKENIZER,
    Echo,
    FakeSessions,
    TalkingEngine,
    asked,
    failed,
    runner,
)
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.config.schema import FilterGroupsConfig, OverlongBufferConfig
from rlhf3d.environments.api import Call, Reset
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environment_runner import EnvironmentFailed
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.source import (
    Draws,
    DynamicSampling,
    OnPolicy,
    OnPolicySettings,
    TooFewGroups,
)
from rlhf3d.experience.steps import Steps, finish
from rlhf3d.rewards.parts import EnvironmentPart
from rlhf3d.rollout.api import SamplingSettings


def drawn(source: Draws, step: int) -> Experience:
    """What a source draws for a step."""
    return finish(source.draw(step))


class Loader:
    """Two prompts at a time; its state is how many it has given."""

    def __init__(self) -> None:
        self.served = 0

    def next_batch(self) -> list[Any]:
        self.served += 2
        return [prompt(self.served - 2), prompt(self.served - 1)]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


def on_policy(
    values: dict[int, float], version: int = 1, **settings: Any
) -> tuple[OnPolicy, FakeEngine]:
    """A source whose trajectories have the given scores, and its engine."""
    engine = FakeEngine()
    collector = Collector(engine, FakeRewards(values), make_tiny_tokenizer())  # type: ignore[arg-type]
    made = OnPolicySettings(n=2, sampling=SamplingSettings(max_tokens=4), seed=0, **settings)
    source = OnPolicy(made, Loader(), collector, lambda: version)  # type: ignore[arg-type]
    return source, engine


def test_groups_are_of_a_prompt() -> None:
    source, engine = on_policy({0: 1.0})
    first = drawn(source, 1)
    assert first.group_ids.tolist() == [0, 0, 1, 1] and first.rewards.tolist() == [1, 0, 0, 0]
    more = drawn(source, 1)
    assert more.group_ids.tolist() == [2, 2, 3, 3], "of the same step: no group twice"
    assert drawn(source, 2).group_ids.tolist() == [0, 0, 1, 1]
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == 12


def test_tokens_of_another_policy_are_refused() -> None:
    with pytest.raises(AssertionError, match="of policies 1 to 1 where 2 to 2 were served"):
        drawn(on_policy({}, version=2)[0], 1)


def test_greedy_answers_are_baselines_and_not_trained_on() -> None:
    """Rewards of the sampled 0 to 3, then of the two groups' greedy ones."""
    source, engine = on_policy(
        {0: 1.0, 1: 0.5, 2: 0.0, 3: 1.0, 4: 0.25, 5: 0.75}, greedy_baseline=True
    )
    rows = drawn(source, 1).trajectories
    assert [row.greedy_reward for row in rows] == [0.25, 0.25, 0.75, 0.75]
    assert {row.trajectory.rows[0].response_ids[0] for row in rows} == {8}
    assert [request.sampling.greedy for request in engine.requests] == [False] * 4 + [True] * 2


def test_overlong_answers_lose_reward_and_keep_their_score() -> None:
    """Two tokens of at most 4 with a buffer of 3: one token over, -1/3; the baseline's as well."""
    buffer = OverlongBufferConfig(enable=True, len=3)
    source, *_ = on_policy({0: 1.0}, overlong=buffer, greedy_baseline=True)
    first = drawn(source, 1).trajectories[0]
    assert first.reward == pytest.approx(2 / 3) and first.score.value == 1.0
    assert first.greedy_reward == pytest.approx(-1 / 3)


class Batches:
    """Hands over the given batches; its state is how many."""

    def __init__(self, *batches: Experience) -> None:
        self.batches: Iterator[Experience] = iter(batches)
        self.taken = 0

    def draw(self, step: int) -> Steps[Experience]:
        self.taken += 1
        yield "generate"
        return next(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def dynamic(batches: Batches, groups: int, max_batches: int) -> DynamicSampling:
    config = FilterGroupsConfig(enable=True, metric="acc", max_num_gen_batches=max_batches)
    return DynamicSampling(batches, config, groups)


def test_groups_without_signal_are_refilled() -> None:
    batches = Batches(
        in_groups([1, 1, 0, 1], 2),
        in_groups([0, 0, 0, 0], 2, first=2),
        in_groups([0, 1, 1, 0], 2, first=4),
        in_groups([1, 0, 1, 0], 2, first=6),
    )
    filled = drawn(dynamic(batches, groups=2, max_batches=4), 1)
    assert filled.group_ids.tolist() == [1, 1, 4, 4] and filled.rewards.tolist() == [0, 1, 0, 1]
    assert filled.metrics == {
        "train/num_gen_batches": 3,
        "filter_groups/generated": 6,
        "filter_groups/kept_share": 0.5,
        "filter_groups/surplus": 1,
        "filter_groups/generated_score/mean": pytest.approx(5 / 12),
        "perf/generated_tokens": 12,
    }
    assert filled.drawn == [1] * 12, "also those without signal"
    assert batches.taken == 3, "no draw more than needed"


def test_groups_of_different_sizes_are_kept_complete() -> None:
    """Rows of a group need not stand together either."""
    rows = [row(1, 8), row(0, 9), row(0, 8), row(0, 9), row(1, 8)]
    filled = drawn(dynamic(Batches(Experience(rows)), groups=1, max_batches=1), 1)
    assert [row.trajectory.group for row in filled.trajectories] == [8, 8, 8]
    assert filled.rewards.tolist() == [1, 0, 1]


def test_an_empty_response_is_no_signal() -> None:
    rows = [row(1, 0), row(0, 0, tokens=()), row(1, 1), row(0, 1)]
    filled = drawn(dynamic(Batches(Experience(rows)), groups=1, max_batches=1), 1)
    assert filled.group_ids.tolist() == [1, 1]


def test_what_cannot_be_filled_says_so_and_counts_as_not_consumed() -> None:
    batches = Batches(*(in_groups([0, 0, 0, 1], 2, first=2 * i) for i in range(4)))
    source = dynamic(batches, groups=1, max_batches=3)
    drawn(source, 1)
    source._groups = 4
    with pytest.raises(TooFewGroups) as caught:
        drawn(source, 2)
    for wanted in (
        "after 3 batches only 3 of 6 groups differ in acc, 4 are needed",
        "max_num_gen_batches = 3",
        "0.25",
    ):
        assert wanted in str(caught.value)
    assert batches.taken == 4 and source.state_dict() == {"taken": 1}


def test_a_source_that_is_loaded_continues_there() -> None:
    source, _ = on_policy({0: 1.0})
    drawn(source, 1)
    state = source.state_dict()
    assert state == {"loader": {"served": 2}}
    outer = DynamicSampling(on_policy({0: 1.0})[0], FilterGroupsConfig(enable=True), groups=1)
    outer.load_state_dict(state)
    assert outer.state_dict() == state
    first = drawn(outer, 2).trajectories[0]
    assert first.trajectory.prompt.index == 2


class Breaks(Echo):
    """The environments of some prompts fail."""

    broken: tuple[int, ...] = (1,)

    def __call__(self, call: Call) -> Any:
        if isinstance(call, Reset) and call.row["index"] in self.broken:
            return failed("no such door")
        return super().__call__(call)


class Asks(Loader):
    """The same prompts as conversations."""

    def next_batch(self) -> list[Any]:
        return [asked(one.index) for one in super().next_batch()]


def with_environments(environment: type[Echo], **settings: Any) -> OnPolicy:
    collector = Collector(
        TalkingEngine(["a", "end"]),
        FakeRewards(),  # type: ignore[arg-type]
        TOKENIZER,
        runner=runner(FakeSessions(environment), max_error_rate=1.0, retries=0),
        environment=EnvironmentPart(),
    )
    made = OnPolicySettings(n=2, sampling=SamplingSettings(max_tokens=100), seed=0, **settings)
    return OnPolicy(made, Asks(), collector, lambda: 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_group_with_a_failed_environment_is_left_out(greedy: bool) -> None:
    experience = drawn(with_environments(Breaks, greedy_baseline=greedy), 1)
    assert experience.group_ids.tolist() == [0, 0] and experience.rewards.tolist() == [1.25] * 2
    assert {row.trajectory.group for row in experience.left_out} == {1}
    assert len(experience.left_out) == 2 + greedy
    assert [row.greedy_reward for row in experience.trajectories] == [1.25 if greedy else None] * 2


def test_a_step_without_a_complete_group_stops() -> None:
    class AllBreak(Breaks):
        broken = (0, 1)

    with pytest.raises(EnvironmentFailed, match=r"every group[\s\S]*4 of 4[\s\S]*no such door"):
        drawn(with_environments(AllBreak), 1)


def test_turns_and_their_rewards_are_in_the_batch() -> None:
    buffer = OverlongBufferConfig(enable=True, len=100)
    experience = drawn(with_environments(Echo, overlong=buffer), 1)
    batch = experience.batch(pad_id=0)
    assert batch["turn_rewards"].sum(-1).tolist() == [1.25] * 4
    length = experience.lengths[0].item()
    assert batch["rewards"].tolist() == pytest.approx([-length / 100] * 4)
    assert "trajectory_ids" not in batch


def test_dynamic_sampling_counts_what_failed_in_all_its_batches() -> None:
    rows = [row(1, 0), row(0, 0)]
    left = [row(0, 1)]
    batches = Batches(Experience([row(1, 2)] * 2, {}, left), Experience(rows, {}, left))
    filled = drawn(dynamic(batches, groups=1, max_batches=2), 1)
    assert len(filled.left_out) == 2 and filled.group_ids.tolist() == [0, 0]
    # Group 2 has no signal; group 1 was left out in both batches of one token each, and generated.
    assert filled.metrics["filter_groups/generated"] == 4
    assert filled.metrics["filter_groups/kept_share"] == 0.25
    assert filled.metrics["filter_groups/generated_score/mean"] == 0.75, "a failure is no score"
    assert filled.metrics["perf/generated_tokens"] == 6
