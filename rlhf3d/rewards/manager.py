"""Scores of a batch's completions: by a rule in killable processes, by a reward model, or by both.

Invariant: a batch always ends, with one score for each item, in order, however the items arrive and
whatever the reward function does. Where one call scores several items and fails, its halves are
tried again until the item that caused it is alone.
Runs in: driver.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from threading import Condition

from rlhf3d.observability.live.state import Waited
from rlhf3d.pool.pool import CallPool
from rlhf3d.pool.process import CallResult, Ending, StartError
from rlhf3d.rewards.function import RewardFunction, prepare
from rlhf3d.rewards.reward_model import ModelPart, ScoreModel
from rlhf3d.rewards.score import Outcome, RewardError, Score, ScoreItem, check_outcomes


class RewardManager:
    """Scores batches of completions, any number of them at once.

    `rule` is called in `workers` processes, each call having `timeout_s` seconds; ValueError where
    it cannot be pickled. None: only the model of `add_model` scores, or without one
    nothing does, and each score is 0. A batch gives up with
    RewardError as soon as more than `max_error_rate` of its items have failed.
    """

    def __init__(
        self,
        rule: RewardFunction | None,
        *,
        workers: int = 1,
        timeout_s: float = 10.0,
        max_error_rate: float = 1.0,
        startup_timeout_s: float = 120.0,
    ) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"reward.workers={workers} must be >= 1 and reward.timeout_s={timeout_s} > 0"
            )
        self.workers, self.timeout_s, self.max_error_rate = workers, timeout_s, max_error_rate
        self.chunk_size = 1 if rule is None else rule.chunk_size
        """Items that one call scores at most."""
        self.pool = None if rule is None else _start_pool(rule, workers, startup_timeout_s)
        self.model: tuple[ScoreModel, ModelPart] | None = None

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes; nothing can be scored after it."""
        if self.pool is not None:
            self.pool.close()

    def add_model(self, model: ScoreModel, part: ModelPart) -> None:
        """Add a reward model's scores to the rule's, or use them alone where there is no rule."""
        self.model = model, part

    def start(self, total: int, judged_by: int | None = None) -> ScoringBatch:
        """Begin a batch of `total` items, which are added as they arrive.

        `judged_by`: the number of items that `max_error_rate` is a share of, `total` or more.
        """
        return ScoringBatch(self, total, total if judged_by is None else judged_by)

    def score_batch(self, items: Sequence[ScoreItem]) -> list[Score]:
        """The score of each item, in order."""
        batch = self.start(len(items))
        batch.add(dict(enumerate(items)))
        return batch.finish()


class ScoringBatch:
    """A batch under way: the rule scores items as they are added, the model when all are there."""

    def __init__(self, manager: RewardManager, total: int, judged_by: int) -> None:
        self._manager, self._total, self._judged_by = manager, total, judged_by
        self._items: dict[int, ScoreItem] = {}
        self._left_out = 0
        # The threads of the pool record scores, so that the caller's is not woken for each of them.
        # Its lock is reentrant: `_take` submits halves while `_ended` holds it.
        self._changed = Condition()
        self._scores: dict[int, Score] = {}
        self._calls: dict[Future[CallResult], tuple[int, float]] = {}
        """Items of each, and when it was given."""
        self._failure: Exception | None = None

    def add(self, items: Mapping[int, ScoreItem]) -> None:
        """Add items under their numbers in the batch, in any order; waits for nothing.

        RewardError where too many have failed by now.
        """
        assert not self._items.keys() & items.keys(), "an item is there already"
        assert all(0 <= number < self._total for number in items), "no such number in the batch"
        self._items.update(items)
        numbers = list(items)
        if self._manager.pool is not None and numbers:
            # At most what one call may score, and little enough that every process gets a share.
            size = min(self._manager.chunk_size, -(-len(numbers) // self._manager.workers))
            for start in range(0, len(numbers), size):
                self._submit(numbers[start : start + size])
        self._raise_failure()

    def leave_out(self, numbers: Collection[int]) -> None:
        """Have no score for these: there is nothing that could be scored."""
        assert not self._items.keys() & numbers, "an item is there already"
        self._left_out += len(numbers)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the rule has scored all that was added, or failed, within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._failure is not None or not self._calls, timeout_s
            )

    @property
    def waited(self) -> Waited:
        """What `wait` waits for; the deadline is that of all calls, a process after the other."""
        with self._changed:
            calls = list(self._calls.values())
        since = min((given for _, given in calls), default=time.monotonic())
        count = sum(items for items, _ in calls)
        rounds = -(-len(calls) // self._manager.workers)
        return Waited(
            [f"the scorer ({count} completions)"], since, rounds * self._manager.timeout_s
        )

    def finish(self) -> list[Score]:
        """Wait for the last score; those of all items that were added, in the order of numbers.

        RewardError where too many items have failed.
        """
        added = len(self._items) + self._left_out
        assert added == self._total, f"{added} of {self._total} items were added"
        # Without a deadline: every call has its own, which the pool keeps.
        self.wait(None)
        self._raise_failure()
        numbers = sorted(self._items)
        if self._manager.model is not None:
            self._add_model_scores(numbers, *self._manager.model)
        if self._manager.pool is None and self._manager.model is None:
            # Only environments reward, which the collector adds.
            return [Score(0.0, Outcome.SCORED)] * len(numbers)
        return [self._scores[number] for number in numbers]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            # A copy: `cancel` calls `_ended` before it returns, which removes the call.
            for call in [*self._calls]:
                call.cancel()
            raise self._failure

    def _submit(self, numbers: list[int]) -> None:
        pool = self._manager.pool
        assert pool is not None
        items = [self._items[number] for number in numbers]
        call = pool.submit(items, self._manager.timeout_s)
        with self._changed:
            self._calls[call] = len(items), time.monotonic()
        # Only after it is in `_calls`: for a call that has ended by now it runs at once.
        call.add_done_callback(partial(self._ended, numbers))

    def _ended(self, numbers: list[int], call: Future[CallResult]) -> None:
        """Record a call that ended; what it raises here is raised to the caller of the batch."""
        with self._changed:
            try:
                # After a failure nothing is recorded or tried again; calls only leave `_calls`.
                if not call.cancelled() and self._failure is None:
                    self._take(numbers, call)
            except Exception as error:
                self._failure = error
            del self._calls[call]
            if self._failure is not None or not self._calls:
                self._changed.notify_all()

    def _take(self, numbers: list[int], call: Future[CallResult]) -> None:
        """Record the scores of a call, or try its halves again."""
        try:
            result = call.result()
        except StartError as error:
            raise RewardError(str(error)) from None
        if result.ending is Ending.VALUE:
            for number, score in zip(numbers, result.value, strict=True):
                self._record(number, score)
        elif len(numbers) > 1:
            # They join `_calls` before this call leaves it, so `finish` cannot return in between.
            half = len(numbers) // 2
            self._submit(numbers[:half])
            self._submit(numbers[half:])
        else:
            self._record(numbers[0], _failure(result, self._manager.timeout_s))

    def _record(self, number: int, score: Score) -> None:
        if not score.failed:
            self._scores[number] = score
            return
        self._scores[number] = _with_sample(score, number, self._items[number])
        # Of the complete batch: among the few scored so far one failure may be a large share.
        scores, allowed = list(self._scores.values()), self._manager.max_error_rate
        check_outcomes(scores, allowed, total=self._judged_by)

    def _add_model_scores(self, numbers: Sequence[int], model: ScoreModel, part: ModelPart) -> None:
        said_of = model.scores([self._items[number] for number in numbers])
        for number, said in zip(numbers, said_of, strict=True):
            self._scores[number] = part.add(self._scores.get(number), said)


def _start_pool(rule: RewardFunction, workers: int, startup_timeout_s: float) -> CallPool:
    try:
        return CallPool(
            partial(prepare, rule),
            workers,
            what="the reward function",
            memory_gib=rule.memory_gib,
            startup_timeout_s=startup_timeout_s,
        )
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the reward function cannot be sent to another process: {error}"
        ) from error


def _failure(result: CallResult, timeout_s: float) -> Score:
    if result.ending is Ending.TIMEOUT:
        message = f"no score within reward.timeout_s={timeout_s}"
        return Score(0.0, Outcome.TIMEOUT, message=message)
    return Score(0.0, Outcome.ERROR, message=result.message)


def _with_sample(score: Score, number: int, item: ScoreItem) -> Score:
    """A failure's message with the sample in front."""
    sample = (
        f"sample {number} of the batch (data_source {item.data_source}, "
        f"index {item.extra_info.get('index')}, ground truth {str(item.ground_truth)[:80]!r}), "
        f"whose text ends {item.solution_str[-100:]!r}"
    )
    return replace(score, message=f"{sample}\n{score.message}")
