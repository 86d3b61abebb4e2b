"""Micro-batches of units of rows: trajectories of several rows that a loss needs at once.

Invariant: as in `micro`: every row is in exactly one micro-batch, all ranks get the same number of
micro-batches, and none is over the rule's limit; and the rows of a unit are together, in order.
Pure: row numbers and token counts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from rlhf3d.batching.micro import MicroBatching
from rlhf3d.units import round_up

Unit = Sequence[int]


def plan_unit_micro_batches(
    lengths: Sequence[int],
    units_of: Sequence[Sequence[Unit]],
    rule: MicroBatching,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Return the micro-batches of each rank, equally many on every rank, as `plan_micro_batches`.

    `units_of[rank]` are a rank's units, of row numbers as indices into `lengths`. Each goes into
    the first micro-batch with room for it, longest first. Raises ValueError when a single unit is
    over the limit.
    """
    for unit in chain.from_iterable(units_of):
        check_limit(lengths, unit, rule)
    first_fit = [_first_fit(lengths, units, rule) for units in units_of]
    # The rank that needs the most decides for all.
    needed = max(len(batches) for batches in first_fit)
    count = round_up(max(needed, 1), multiple_of)
    planned = []
    for batches in first_fit:
        filled = _split_up(lengths, batches, rule, count)
        planned.append([list(chain.from_iterable(batch)) for batch in filled])
    return planned


def _rows(units: Sequence[Unit]) -> list[int]:
    return list(chain.from_iterable(units))


def _positions(lengths: Sequence[int], units: Sequence[Unit], rule: MicroBatching) -> int:
    return rule.positions([lengths[row] for row in _rows(units)])


def _fits(lengths: Sequence[int], units: Sequence[Unit], rule: MicroBatching) -> bool:
    if rule.tokens is None:
        return len(_rows(units)) <= rule.rows
    return _positions(lengths, units, rule) <= rule.tokens


def check_limit(lengths: Sequence[int], unit: Unit, rule: MicroBatching) -> None:
    """Raise ValueError when a unit, with no token in common, is over the limit."""
    if _fits(lengths, [unit], rule):
        return
    of_rows = [lengths[row] for row in unit]
    what = f"a trajectory of {len(unit)} rows, which actor.policy_loss needs in one micro-batch"
    if rule.tokens is None:
        raise ValueError(
            f"ppo_micro_batch_size_per_gpu = {rule.rows}: {what}; set at least {len(unit)}, or a "
            "policy loss that goes by tokens, such as vanilla"
        )
    needed = rule.positions(of_rows)
    if rule.packed:
        terms = " + ".join(str(rule.packed_row(length)) for length in of_rows)
    else:
        terms = f"{len(unit)} x {rule.width(max(of_rows))}"
    raise ValueError(
        f"ppo_max_token_len_per_gpu = {rule.tokens}: {what}, takes {terms} = {needed} positions "
        f"(rounded up to a multiple of {rule.multiple_of}); set at least {needed}, or a policy "
        "loss that goes by tokens, such as vanilla"
    )


def _first_fit(
    lengths: Sequence[int], units: Sequence[Unit], rule: MicroBatching
) -> list[list[Unit]]:
    """Micro-batches within the limit; units of similar length meet, as padding wants it."""

    def longest_first(unit: Unit) -> tuple[int, int]:
        return -max(lengths[row] for row in unit), unit[0]

    batches: list[list[Unit]] = []
    for unit in sorted(units, key=longest_first):
        fitting = (batch for batch in batches if _fits(lengths, [*batch, unit], rule))
        batch = next(fitting, None)
        if batch is None:
            batches.append([unit])
        else:
            batch.append(unit)
    return batches


def _split_up(
    lengths: Sequence[int], batches: list[list[Unit]], rule: MicroBatching, count: int
) -> list[list[Unit]]:
    """The same units in exactly `count` micro-batches, the largest first, empty ones last."""

    def size(batch: list[Unit]) -> int:
        return _positions(lengths, batch, rule) if batch else 0

    batches = list(batches)
    while len(batches) < count:
        splittable = [batch for batch in batches if len(batch) > 1]
        if not splittable:
            batches.append([])
            continue
        largest = max(splittable, key=size)
        batches.remove(largest)
        half = len(largest) // 2
        batches += [largest[:half], largest[half:]]
    return sorted(batches, key=size, reverse=True)
