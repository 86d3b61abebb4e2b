"""What engines that are started again are given."""

from __future__ import annotations

from rlhf3d.placement.ledger import Ledger
from rlhf3d.rollout.api import Request, SamplingSettings


def requests(*numbers: int) -> dict[int, Request]:
    return {number: Request((number,), number, SamplingSettings()) for number in numbers}


def test_all_that_came_at_once_is_given_again_in_its_order() -> None:
    """Also what was answered: the engine takes the same steps, and has the same prefixes."""
    ledger = Ledger(2)
    ledger.add(0, requests(0, 2, 4), idle=True)
    ledger.add(1, requests(1, 3), idle=True)
    ledger.add(0, requests(7, 5), idle=True)
    assert ledger.again(0, {5}) == [requests(0, 2, 4), requests(7, 5)]
    assert [list(given) for given in ledger.again(0, {5})] == [[0, 2, 4], [7, 5]]
    assert ledger.again(1, ()) == [requests(1, 3)]


def test_of_what_came_while_others_ran_the_unanswered_is_given_again() -> None:
    ledger = Ledger(1)
    ledger.add(0, requests(1), idle=True)
    ledger.add(0, requests(2, 3), idle=True)
    ledger.add(0, requests(4, 5), idle=False)
    assert ledger.again(0, {3, 4}) == [requests(1), requests(3, 4)]
    assert ledger.again(0, ()) == [requests(1)]


def test_what_was_aborted_is_not_given_again() -> None:
    ledger = Ledger(1)
    ledger.add(0, requests(1, 2, 3), idle=True)
    ledger.drop(0, [2])
    assert ledger.again(0, {1, 3}) == [requests(1, 3)]


def test_other_weights_begin_a_new_page() -> None:
    ledger = Ledger(1)
    ledger.add(0, requests(1), idle=True)
    ledger.turn_page(())
    assert ledger.again(0, {1}) == []


def test_unfinished_requests_go_on_under_other_weights() -> None:
    """Of them, and of what comes to them, only the unanswered is given again."""
    ledger = Ledger(2)
    ledger.add(0, requests(1), idle=True)
    ledger.add(0, requests(2, 3, 4), idle=True)
    ledger.add(1, requests(5), idle=True)
    ledger.turn_page({3, 4})
    ledger.add(0, requests(6, 7), idle=False)
    assert ledger.again(0, {3, 7}) == [requests(3, 7)]
    assert ledger.again(0, {3, 4, 6, 7}) == [requests(3, 4, 6, 7)]
    ledger.add(1, requests(8), idle=True)
    assert ledger.again(1, {8}) == [requests(8)]
