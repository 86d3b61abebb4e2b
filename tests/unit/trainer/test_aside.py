"""What a step works out while its ranks compute: the same, in order, and done before it is over."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rlhf3d.trainer.aside import Aside


def test_calls_are_made_in_order_and_done_at_the_end() -> None:
    begun, done = threading.Event(), []

    def note(number: int) -> int:
        assert begun.wait(10)
        done.append(number)
        return number

    with Aside() as aside:
        results = [aside.start(note, number) for number in range(3)]
        assert not done, "nobody waits for them"
        begun.set()
    assert done == [result() for result in results] == [0, 1, 2]


def fail(text: str) -> Any:
    raise ValueError(text)


def test_a_failure_ends_the_step_at_its_end_or_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="the disk is full"), Aside() as aside:
        aside.start(fail, "the disk is full")
    with pytest.raises(ValueError, match="asked for"), Aside() as aside:
        aside.start(fail, "asked for")()


def test_what_ended_the_step_is_raised_after_all_is_written() -> None:
    done: list[int] = []
    with pytest.raises(KeyError, match="the ranks"), Aside() as aside:
        aside.start(fail, "another")
        aside.start(done.append, 1)
        raise KeyError("the ranks")
    assert done == [1]
