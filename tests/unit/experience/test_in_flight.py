"""Groups in flight: none is trained on too late, none is lost, and a stop loses nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experience import FakeRewards, prompt, row
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environment_runner import EnvironmentFailed
from rlhf3d.experience.in_flight import InFlight, InFlightSettings
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.source import OnPolicy, OnPolicySettings, TooFewGroups
from rlhf3d.experience.steps import Patience, Steps, untimed
from rlhf3d.rewards.score import Outcome, RewardError, Score
from rlhf3d.rollout.api import Completion, Request, SamplingSettings
from rlhf3d.rollout.desk import Desks

N, GROUPS, STEPS = 2, 3, 6


class Scores(FakeRewards):
    """Scores several collections at once."""

    def start(self, total: int, judged_by: int) -> FakeRewards:
        return FakeRewards(self.values)


class Loader:
    """Two prompts at a time: not a step's number of groups."""

    def __init__(self) -> None:
        self.served = 0

    def next_batch(self) -> list[Any]:
        self.served += 2
        return [prompt(self.served - 2), prompt(self.served - 1)]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


class Engines:
    """Writes two tokens, each in a turn that chance gives it, with the weights of then."""

    def __init__(self, seed: int) -> None:
        self.version: int | None = None
        self._random = random.Random(seed)
        self._open: dict[int, list[int]] = {}

    def submit(self, requests: Mapping[int, Request]) -> None:
        assert self.version is not None
        self._open |= {number: [] for number in requests}

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        done = {}
        assert self.version is not None
        for number, versions in list(self._open.items()):
            if self._random.random() < 0.3:
                versions.append(self.version)
            if len(versions) == 2:
                del self._open[number]
                a, b = versions
                spans = ((0, a),) if a == b else ((0, a), (1, b))
                done[number] = Completion((8, 8), (-1.0, -1.0), "stop", spans)
        return done

    def abort(self, numbers: Any) -> None:
        for number in numbers:
            self._open.pop(number, None)


class Run:
    """A trainer's view of a source with groups in flight."""

    def __init__(self, seed: int, staleness: int, **changes: Any) -> None:
        self.engines, self.loader, self.trained = Engines(seed), Loader(), 0
        scores: Any = Scores()
        desks = Desks(self.engines)
        collector = Collector(desks.open(), scores, make_tiny_tokenizer())
        drawing = OnPolicySettings(n=N, sampling=SamplingSettings(max_tokens=4), seed=0)
        loader: Any = self.loader
        draws = OnPolicy(drawing, loader, collector, lambda: self.engines.version)
        made = InFlightSettings(GROUPS, N, staleness, STEPS, **changes)
        self.source = InFlight(
            made,
            draws,
            collector,
            desks,
            self._sync,
            lambda: self.trained,
            lambda: self.engines.version,
            Patience(),
            untimed,
            prompt,
        )

    def _sync(self) -> dict[str, float]:
        self.engines.version = self.trained
        return {}

    def step(self, step: int, looks: int = 0) -> Experience:
        experience = self.source.next_batch(step)
        for _ in range(looks):
            self.source.go_on()
        self.trained += 1
        return experience


def asked(experience: Experience) -> set[int]:
    return {one.trajectory.prompt.index for one in experience.trajectories}


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 30))
def test_none_is_too_old_and_each_is_trained_on_once(seed: int, staleness: int, looks: int) -> None:
    run = Run(seed, staleness)
    seen: list[int] = []
    drawn: list[int] = []
    for step in range(1, STEPS + 1):
        experience = run.step(step, looks)
        drawn += experience.drawn
        assert len(drawn) >= step * GROUPS * N, "what is trained on has come to its end"
        assert len(experience.trajectories) == GROUPS * N
        for one in experience.trajectories:
            assert step - 1 - one.trajectory.oldest_version <= staleness
        prompts = asked(experience)
        assert len(prompts) == GROUPS
        seen += prompts
    assert len(set(seen)) == len(seen) == STEPS * GROUPS
    assert drawn == [2] * STEPS * GROUPS * N, "each has come to its end once"
    # All that was begun was needed.
    assert run.source.state_dict()["in_flight"]["handed_over"] == STEPS * GROUPS
    assert not run.source.go_on()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, STEPS - 1))
def test_a_stop_loses_and_repeats_nothing(seed: int, staleness: int, stop: int) -> None:
    first = Run(seed, staleness)
    seen: list[int] = []
    drawn: list[int] = []
    ended: list[int] = []
    for step in range(1, stop + 1):
        experience = first.step(step, looks=5)
        seen, drawn = [*seen, *asked(experience)], [*drawn, *experience.drawn]
        ended += experience.ended
    with TemporaryDirectory() as folder:
        first.source.save(Path(folder) / "experience")
        second = Run(seed + 1, staleness)
        second.trained = stop
        second.source.load_state_dict(first.source.state_dict())
        second.source.load(Path(folder) / "experience")
    for step in range(stop + 1, STEPS + 1):
        experience = second.step(step, looks=5)
        for one in experience.trajectories:
            assert step - 1 - one.trajectory.oldest_version <= staleness
        seen, drawn = [*seen, *asked(experience)], [*drawn, *experience.drawn]
        ended += experience.ended
    assert sorted(seen) == list(range(STEPS * GROUPS)), "the data's prompts, each once"
    assert sorted(ended) == list(range(STEPS * GROUPS)), "the end of each is reported once"
    assert drawn == [2] * STEPS * GROUPS * N


def test_what_is_begun_again_is_sampled_as_the_configuration_says_now(tmp_path: Path) -> None:
    first, second = Run(0, staleness=2), Run(0, staleness=2)
    first.step(1)
    first.source.save(tmp_path / "experience")
    second.trained = second.engines.version = 1
    now = SamplingSettings(temperature=0.5, max_tokens=3)
    drawing = OnPolicySettings(n=N, sampling=now, seed=0)
    second.source._source._settings = drawing
    second.source.load_state_dict(first.source.state_dict())
    second.source.load(tmp_path / "experience")
    again = [request for group in second.source._waiting for request in group]
    assert again and all(request.sampling == now for request in again)


def test_after_steps_that_drew_their_own_batches_it_goes_on_as_the_next_one() -> None:
    """No name or seed is used again, and nothing is drawn that no step takes."""
    run = Run(0, staleness=2)
    run.trained = run.engines.version = 2
    run.source.load_state_dict({"step": 2, "loader": {"served": 2 * GROUPS}})
    names: list[str] = []
    for step in range(3, STEPS + 1):
        names += [one.trajectory.name for one in run.step(step, looks=5).trajectories]
    assert all(int(name[1:].split(".")[0]) > 2 for name in names)
    assert run.source.state_dict()["in_flight"]["handed_over"] == STEPS * GROUPS
    assert not run.source._complete and not run.source.go_on()


@pytest.mark.timeout(300)
def test_a_bound_that_no_run_reaches_costs_nothing() -> None:
    run = Run(0, staleness=10**12)
    seen = [index for step in range(1, STEPS + 1) for index in asked(run.step(step, looks=9))]
    assert sorted(seen) == list(range(STEPS * GROUPS))


def test_engines_that_had_nothing_to_do_are_seen() -> None:
    run = Run(0, staleness=1)
    assert run.step(1).metrics["async/engines_waited_s"] < 0.8
    while run.source.go_on():
        pass
    time.sleep(1.0)
    assert run.step(2).metrics["async/engines_waited_s"] >= 1.0
    assert run.step(3).metrics["async/engines_waited_s"] < 0.8


def test_no_more_are_under_way_than_may_be() -> None:
    run = Run(0, staleness=3, max_trajectories=2 * N)
    run.step(1)
    assert len(run.source._running) <= 2


def test_groups_without_signal_are_replaced_and_counted() -> None:
    class Alternating(Scores):
        """Of every second group the first answer is right."""

        calls = 0

        def start(self, total: int, judged_by: int) -> FakeRewards:
            self.calls += 1
            return FakeRewards({0: float(self.calls % 2)})

    run = Run(0, staleness=1, metric="score", max_generated=99)
    rewards: Any = Alternating()
    object.__setattr__(run.source._collector, "rewards", rewards)
    experience = run.step(1)
    assert sorted(experience.rewards.tolist()) == [0.0] * 3 + [1.0] * 3
    generated = experience.metrics["filter_groups/generated"]
    assert generated > GROUPS
    assert experience.metrics["perf/generated_tokens"] == generated * N * 2
    right = sum(number % 2 for number in range(1, int(generated) + 1))
    score = experience.metrics["filter_groups/generated_score/mean"]
    assert score == pytest.approx(right / (generated * N))


def test_what_cannot_be_filled_says_so() -> None:
    run = Run(0, staleness=1, metric="score", max_generated=7)
    with pytest.raises(TooFewGroups, match="of 8 groups that ended for one step 8 do not differ"):
        run.step(1)


def test_groups_that_end_while_ranks_train_are_not_too_many() -> None:
    """All have signal: whatever waits, each step is filled by the first that end."""

    class Signal(Scores):
        def start(self, total: int, judged_by: int) -> FakeRewards:
            return FakeRewards({0: 1.0})

    run = Run(0, staleness=3, metric="score", max_generated=GROUPS)
    rewards: Any = Signal()
    object.__setattr__(run.source._collector, "rewards", rewards)
    generated = [
        run.step(step, looks=60).metrics["filter_groups/generated"] for step in range(1, STEPS + 1)
    ]
    assert max(generated) > GROUPS and sum(generated) == STEPS * GROUPS


def test_scoring_that_fails_for_all_is_no_score_of_zero() -> None:
    """Of each group alone it is few enough; of all that ended it is not."""
    failed = Score(0.0, Outcome.ERROR, message="KeyError: 'x'")

    class Failing(Scores):
        def start(self, total: int, judged_by: int) -> FakeRewards:
            assert judged_by == GROUPS * N
            return FakeRewards(dict.fromkeys(range(total), failed))

    run = Run(0, staleness=1, max_scoring_failures=0.4)
    rewards: Any = Failing()
    object.__setattr__(run.source._collector, "rewards", rewards)
    with pytest.raises(RewardError, match=r"4 of 6 completions were not scored[\s\S]*KeyError"):
        run.step(1)


def test_environments_that_all_fail_stop_it() -> None:
    """Groups that are left out are drawn again, but not for ever."""
    unfinished = Score(0.0, Outcome.ENV_ERROR, message="no such door")
    run = Run(0, staleness=1)

    def broken(requests: Any, collector: Any) -> Steps[Experience]:
        yield "generate"
        return Experience([], left_out=[row(unfinished, requests[0].group)] * N)

    run.source._source.draw_group = broken  # type: ignore[method-assign]
    with pytest.raises(EnvironmentFailed, match=r"every group[\s\S]*no such door"):
        run.step(1)
    run = Run(0, staleness=1, max_environment_failures=0.5)
    run.source._source.draw_group = broken  # type: ignore[method-assign]
    with pytest.raises(EnvironmentFailed, match="the environments of 4 of 6 trajectories failed"):
        run.step(1)
