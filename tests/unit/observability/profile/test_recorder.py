"""What a process notes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlhf3d.observability.profile import recorder as module
from rlhf3d.observability.profile.recorder import recorder, span, start_recording, take_record


class Ticks:
    """A clock that goes on by 10 at each look."""

    def __init__(self) -> None:
        self.now = 0

    def stamp(self) -> int:
        self.now += 10
        return self.now

    def ns(self, stamp: int) -> int:
        return stamp


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    yield
    take_record()


def test_nothing_is_made_without_a_profile() -> None:
    assert recorder() is None
    assert span("forward", "forward", micro_batch=1) is span("other", "wait")
    with span("forward", "forward"):
        pass
    assert take_record() is None


def test_spans_nest_and_survive_what_raises() -> None:
    start_recording(Ticks())
    with pytest.raises(KeyError), span("outer", "call"), span("inner", "forward", tokens=3):
        raise KeyError
    record = take_record()
    assert record is not None
    found = [(one.name, one.kind, one.began, one.ended, one.details) for one in record.spans]
    assert found == [
        ("inner", "forward", 30, 40, {"tokens": 3}),
        ("outer", "call", 20, 50, {}),
    ]
    assert module.recorder() is None


def test_what_began_before_or_goes_on_is_left_out() -> None:
    outside = span("before", "phase")
    with outside:
        start_recording(Ticks())
    late = span("late", "phase")
    with late:
        record = take_record()
    assert record is not None and record.spans == ()


def test_lives_of_requests() -> None:
    start_recording(Ticks())  # began at 10
    found = recorder()
    assert found is not None
    found.submitted(1, prompt_tokens=5)  # 20
    found.seen(1, 5, tokens=0, before=0)
    found.seen(1, 5, tokens=1, before=0)  # 30
    found.seen(2, 7, tokens=9, before=8)  # was there when the profile began
    found.seen(1, 5, tokens=2, before=1)
    found.seen(5, 7, tokens=9, before=0)  # was there, and waited
    found.ended(1)  # 40
    found.submitted(3, 4)  # 50
    found.ended(3, aborted=True)  # 60
    found.ended(4)
    record = take_record()
    assert record is not None
    first, second, waited, third = record.requests
    assert (waited.submitted, waited.first_token) == (10, 10)
    assert (first.submitted, first.first_token, first.ended, first.tokens) == (20, 30, 40, 2)
    assert (second.submitted, second.first_token, second.ended, second.tokens) == (10, 10, None, 9)
    assert third.aborted and third.first_token is None and third.ended == 60
