"""Drawing ahead: which weights write which batch, and that no moment changes that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.experience import row

from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.ahead import Ahead
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.source import TooFewGroups
from rlhf3d.experience.steps import Patience, Steps, untimed

STEPS = 7


class Policy:
    """Weights that a trainer changes and engines serve."""

    def __init__(self) -> None:
        self.trained = 0
        self.served: int | None = None

    def sync(self) -> dict[str, float]:
        self.served = self.trained
        return {"sync/of": float(self.trained)}


class Slow:
    """Takes `waits` rounds for each batch, and notes which weights wrote it."""

    def __init__(self, policy: Policy, waits: int = 3, fails_at: int = 99) -> None:
        self._policy, self._waits, self._fails_at = policy, waits, fails_at
        self.written: dict[int, int] = {}
        self._position = 0

    def draw(self, step: int) -> Steps[Experience]:
        if step == self._fails_at:
            raise TooFewGroups("all solved")
        began = self._policy.served
        for _ in range(self._waits):
            yield "generate"
        yield "score"
        assert began is not None and self._policy.served == began, "other weights in a batch"
        self.written[step] = began
        self._position = step
        return Experience([row(1.0, 0)])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


class Dying(Slow):
    """Its engines die at some of its waits; they start again, with the newest weights, as soon as
    nothing else is at work."""

    def __init__(self, policy: Policy, patience: Patience, deaths: list[bool]) -> None:
        super().__init__(policy)
        self._patience, self._deaths = patience, deaths
        self.newest: dict[int, int] = {}
        """The version that each batch was completed by."""

    def draw(self, step: int) -> Steps[Experience]:
        began, dead = self._policy.served, False
        for _ in range(self._waits):
            yield "generate"
            dead |= bool(self._deaths) and self._deaths.pop()
            while dead and self._patience.background:
                yield "generate"
            if dead:
                self._policy.sync()
                dead = False
        assert began is not None and self._policy.served is not None
        assert step not in self.written, "a batch is drawn once"
        self.written[step], self.newest[step] = began, self._policy.served
        return Experience([row(1.0, 0)])


def prompt_of(index: int) -> Prompt:
    return row(1.0, 0).trajectory.prompt


def ahead(
    source: Slow,
    policy: Policy,
    staleness: int,
    last_step: int = STEPS,
    patience: Patience | None = None,
) -> Ahead:
    patience = patience or Patience()
    return Ahead(source, policy.sync, patience, untimed, staleness, last_step, prompt_of)


def train(source: Ahead, policy: Policy, step: int, background: tuple[int, int] = (0, 0)) -> None:
    """A step in which the driver looks at other work so often before and in its update."""
    source.next_batch(step)
    for _ in range(background[0]):
        source.go_on()
    source.before_update(step)
    for _ in range(background[1]):
        source.go_on()
    policy.trained = step


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_each_batch_has_the_weights_of_its_schedule(staleness: int) -> None:
    policy = Policy()
    source = Slow(policy)
    experience = ahead(source, policy, staleness)
    for step in range(1, STEPS + 1):
        train(experience, policy, step)
    written = {step: max(0, step - 1 - staleness) for step in range(1, STEPS + 1)}
    assert source.written == written


@given(
    st.integers(0, 3),
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=STEPS, max_size=STEPS),
    st.sets(st.integers(1, STEPS)),
)
def test_no_moment_changes_who_writes_what(
    staleness: int, waits: int, background: list[tuple[int, int]], validated: set[int]
) -> None:
    policy = Policy()
    source = Slow(policy, waits)
    experience = ahead(source, policy, staleness)
    for step in range(1, STEPS + 1):
        train(experience, policy, step, background[step - 1])
        if step in validated:
            experience.settle(step)
            policy.sync()
    assert source.written == {s: max(0, s - 1 - staleness) for s in range(1, STEPS + 1)}


@given(
    st.integers(0, 3),
    st.lists(st.booleans(), max_size=30),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=STEPS, max_size=STEPS),
    st.sets(st.integers(1, STEPS)),
)
def test_engines_that_got_newer_weights_keep_the_bound(
    staleness: int,
    deaths: list[bool],
    background: list[tuple[int, int]],
    validated: set[int],
) -> None:
    policy, patience = Policy(), Patience()
    source = Dying(policy, patience, deaths)
    experience = ahead(source, policy, staleness, patience=patience)
    for step in range(1, STEPS + 1):
        train(experience, policy, step, background[step - 1])
        if step in validated:
            experience.settle(step)
            policy.sync()
    assert list(source.written) == list(range(1, STEPS + 1))
    for step in source.written:
        oldest, newest = source.written[step], source.newest[step]
        assert max(0, step - 1 - staleness) <= oldest <= newest <= step - 1


def test_nothing_is_drawn_beyond_the_last_step() -> None:
    policy = Policy()
    source = Slow(policy)
    experience = ahead(source, policy, staleness=3, last_step=2)
    for step in (1, 2):
        train(experience, policy, step, (9, 9))
    experience.settle(2)
    assert sorted(source.written) == [1, 2] and not experience.go_on()


def test_without_staleness_the_trainer_alone_waits() -> None:
    policy = Policy()
    experience = ahead(Slow(policy), policy, staleness=0)
    for step in (1, 2):
        batch = experience.next_batch(step)
        assert batch.metrics == {"sync/of": step - 1}, "no figures of what is ahead"
        assert not experience.go_on()
        policy.trained = step


def test_a_stop_counts_with_the_batch_that_it_waits_for() -> None:
    """In turn nothing is ahead, however long a batch takes."""

    class Sleeping(Slow):
        def draw(self, step: int) -> Steps[Experience]:
            time.sleep(0.05)
            return (yield from super().draw(step))

    for staleness, at_least in ((0, 0.0), (1, 0.05)):
        policy = Policy()
        source = ahead(Sleeping(policy), policy, staleness)
        train(source, policy, 1)
        assert (source.settle_s > 0) == (at_least > 0) and source.settle_s >= at_least


def test_a_failure_is_raised_where_its_batch_is_wanted() -> None:
    policy = Policy()
    experience = ahead(Slow(policy, fails_at=3), policy, staleness=2)
    for step in (1, 2):
        train(experience, policy, step, (9, 9))
    assert experience.state_dict() == {"position": 2}, "after the last batch that there is"
    with pytest.raises(TooFewGroups):
        experience.next_batch(3)


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_run_that_was_stopped_goes_on_with_the_same_batches(
    staleness: int, tmp_path: Path
) -> None:
    policy = Policy()
    first = ahead(Slow(policy), policy, staleness)
    for step in (1, 2):
        train(first, policy, step, (2, 2))
    first.settle(2)
    state = first.state_dict()
    first.save(tmp_path / "experience")
    assert state == {"position": 2 + staleness}, "after the last batch that is saved"

    policy = Policy()
    policy.trained = 2
    source = Slow(policy)
    second = ahead(source, policy, staleness)
    second.load_state_dict(state)
    second.load(tmp_path / "experience")
    for step in range(3, STEPS + 1):
        train(second, policy, step)
    drawn_again = {step: step - 1 - staleness for step in range(3 + staleness, STEPS + 1)}
    assert source.written == drawn_again


def test_nothing_ahead_makes_no_folder(tmp_path: Path) -> None:
    policy = Policy()
    experience = ahead(Slow(policy), policy, staleness=0)
    train(experience, policy, 1)
    experience.save(tmp_path / "experience")
    assert not (tmp_path / "experience").exists()
