"""Scoring in child processes that are killed at their deadline.

Invariant: a batch always ends, with one score for each item, in order, whatever the reward function does and however
the items arrive: a process that hangs, crashes, exits or eats memory costs its own item only, and is replaced. Signals
and threads could not promise that, for code that never returns to the interpreter. Where one call scores several items
and fails, its halves are tried again until the item that caused it is alone.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from rlhf3d.processes import deaf_to_signals, listen_again
from rlhf3d.rewards.calls import score_items
from rlhf3d.rewards.scoring import (
    Outcome,
    RewardError,
    RewardFunction,
    Score,
    ScoreItem,
    check_outcomes,
)

_ORPHAN_GRACE_S = 2.0
_OUT_OF_MEMORY = 77
"""Exit code of a scoring process that ran out of memory."""
_CHILD = "import sys; from rlhf3d.rewards.pool import serve; serve(int(sys.argv[1]))"


class ScoringPool:
    """`workers` processes that call `fn`, each call having `timeout_s` seconds.

    `fn` must pickle (a module's function, `BuiltinReward` or `load_custom_reward(...)`), or ValueError. One that has a
    `chunk_size` is called with up to so many items at once, and the deadline is that call's.
    Loading it has a deadline of its own, `startup_timeout_s`. `score_batch` gives up with RewardError as
    soon as more than `max_error_rate` of a batch's items have failed.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        fn: RewardFunction,
        max_error_rate: float = 1.0,
        startup_timeout_s: float = 120.0,
    ) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"reward.workers={workers} must be >= 1 and reward.timeout_s={timeout_s} > 0"
            )
        try:
            self._pickled_fn = pickle.dumps(fn)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the reward function cannot be sent to another process: {error}"
            ) from error
        self._chunk_size = int(getattr(fn, "chunk_size", 1))
        self._timeout_s = timeout_s
        self._max_error_rate = max_error_rate
        self._startup_timeout_s = startup_timeout_s
        self._todo: deque[list[int]] | None = None
        self._workers = [self._start() for _ in range(workers)]

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes; the pool cannot be used again."""
        while self._workers:
            self._workers.pop().kill()

    def score_batch(self, items: Sequence[ScoreItem]) -> list[Score]:
        """The score of each item, in order."""
        scoring = self.start(len(items))
        scoring.add(dict(enumerate(items)))
        return scoring.finish()

    def start(self, total: int) -> Scoring:
        """A batch of `total` items that arrive while others are scored; the pool has one at a time."""
        assert self._workers, "the pool is closed"
        assert self._todo is None, "the batch before was not finished"
        self._todo = deque()
        return Scoring(self, total, self._max_error_rate)

    def put(self, numbers: Sequence[int]) -> None:
        """Queue arrived items of the batch by their numbers."""
        assert self._todo is not None
        runs = _chunks(len(numbers), self._chunk_size, len(self._workers))
        self._todo.extend([numbers[place] for place in run] for run in runs)

    def end(self) -> None:
        """The batch is complete, and the next can start."""
        self._todo = None

    def advance(self, items: Mapping[int, ScoreItem], *, patient: bool) -> list[tuple[int, Score]]:
        """Hand out queued items; the scores that have come since, where `patient` after a wait for the next event."""
        todo = self._todo
        assert todo is not None
        for number, worker in enumerate(self._workers):
            if worker.ready and worker.job is None and todo:
                if worker.send([items[index] for index in todo[0]], self._timeout_s):
                    worker.job = todo.popleft()
                else:
                    worker.kill()
                    self._workers[number] = self._start()
        awaited = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        if not awaited:
            return []
        patience_s = (
            min(worker.deadline for worker in awaited) - time.monotonic() if patient else 0.0
        )
        events = set(wait([worker.connection for worker in awaited], max(0.0, patience_s)))
        ended: list[tuple[int, Score]] = []
        for number, worker in enumerate(self._workers):
            if worker.connection in events:
                scores = self._receive(number)
            elif worker in awaited and time.monotonic() >= worker.deadline:
                scores = self._expire(number)
            else:
                continue
            job, worker.job = worker.job, None
            if job is None:
                continue
            if isinstance(scores, Score) and len(job) > 1:
                half = len(job) // 2
                todo.extendleft([job[half:], job[:half]])
            else:
                found = [scores] if isinstance(scores, Score) else scores
                assert found is not None
                ended += zip(job, found, strict=True)
        return ended

    def _receive(self, number: int) -> list[Score] | Score | None:
        """What a process sent: the scores of its items, how the call for them failed, or (null) that it is ready."""
        worker = self._workers[number]
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            code = worker.kill(grace_s=1.0)
            reason = (
                "out of memory" if code == _OUT_OF_MEMORY else "os._exit, a crash, or out of memory"
            )
            text = f"the scoring process ended with exit code {code} ({reason})"
            if not worker.ready:
                raise RewardError(f"{text} while it loaded the reward function") from None
            self._workers[number] = self._start()
            return Score(0.0, Outcome.ERROR, message=text)
        if worker.ready:
            assert isinstance(message, list | Score)
            return message
        if message is not None:
            raise RewardError(f"a scoring process could not load the reward function:\n{message}")
        worker.ready = True
        return None

    def _expire(self, number: int) -> Score:
        if not self._workers[number].ready:
            raise RewardError(
                f"the reward function did not load within {self._startup_timeout_s} s"
            )
        self._workers[number].kill()
        self._workers[number] = self._start()
        return Score(
            0.0, Outcome.TIMEOUT, message=f"no score within reward.timeout_s={self._timeout_s}"
        )

    def _start(self) -> _Worker:
        return _Worker(
            self._pickled_fn, self._timeout_s, time.monotonic() + self._startup_timeout_s
        )


class Scoring:
    """A batch under way: items are added as they arrive, in any order, and are scored meanwhile."""

    def __init__(self, pool: ScoringPool, total: int, max_error_rate: float) -> None:
        self._pool, self._total, self._max_error_rate = pool, total, max_error_rate
        self._items: dict[int, ScoreItem] = {}
        self._scores: dict[int, Score] = {}

    def add(self, items: Mapping[int, ScoreItem]) -> None:
        """Add items under their numbers in the batch; waits for nothing."""
        assert not self._items.keys() & items.keys() and all(
            0 <= number < self._total for number in items
        )
        self._items.update(items)
        self._pool.put(list(items))
        # Twice: processes that have just answered get work at once.
        for _ in range(2):
            self._advance(patient=False)

    def finish(self) -> list[Score]:
        """Wait for the last score; all of them, in order."""
        assert len(self._items) == self._total, (
            f"{len(self._items)} of {self._total} items were added"
        )
        while len(self._scores) < self._total:
            self._advance(patient=True)
        self._pool.end()
        return [self._scores[number] for number in range(self._total)]

    def _advance(self, *, patient: bool) -> None:
        try:
            for number, score in self._pool.advance(self._items, patient=patient):
                self._scores[number] = _name(score, number, self._items[number])
                if score.failed:
                    check_outcomes(
                        list(self._scores.values()), self._max_error_rate, total=self._total
                    )
        except BaseException:
            self._pool.close()  # a process still at work would answer into the next batch
            raise


class _Worker:
    """One scoring process as the parent sees it: starting until `ready`, busy while it has a `job`."""

    def __init__(self, pickled_fn: bytes, timeout_s: float, deadline: float) -> None:
        self.connection, child_end = Pipe()
        # Not multiprocessing.Process: its children import the parent's main module again, and with it
        # whatever that imports (torch, ray). A session of its own, so that the parent can kill what the
        # function starts, and Ctrl-C reaches only the parent.
        with deaf_to_signals():
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        child_end.close()
        self.connection.send((pickled_fn, timeout_s))
        self.ready = False
        self.job: list[int] | None = None
        self.deadline = deadline

    def send(self, items: list[ScoreItem], timeout_s: float) -> bool:
        """Give the process items; False where it has died since its last ones."""
        try:
            self.connection.send(items)
        except OSError:
            return False
        self.deadline = time.monotonic() + timeout_s
        return True

    def kill(self, grace_s: float = 0.0) -> int:
        """End the process, unless it ends by itself within `grace_s`, and all it started; its exit code."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.connection.close()
        return self._process.wait()


def serve(file_descriptor: int) -> None:
    """Life of a scoring process: load the function, say so, then score items until the parent is gone."""
    listen_again()
    connection: Connection[Any, Any] = Connection(file_descriptor)
    os.dup2(2, 1)  # what the function prints is no part of the command's output
    pickled_fn, timeout_s = connection.recv()
    try:
        fn: RewardFunction = pickle.loads(pickled_fn)
        getattr(fn, "prepare", lambda: None)()
    except (Exception, SystemExit):
        connection.send(traceback.format_exc())
        return
    if memory_gib := getattr(fn, "memory_gib", None):
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * 2**30),) * 2)
    connection.send(None)
    while True:
        try:
            items = connection.recv()
            # Should the parent die meanwhile, the kernel ends even a call that never returns.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
            scores = _call(fn, items)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            connection.send(scores)
        except (EOFError, OSError):
            return
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)  # what it holds would starve the next items


def _call(fn: RewardFunction, items: list[ScoreItem]) -> list[Score] | Score:
    """A score each, or how the call for all of them failed."""
    try:
        return score_items(fn, items)
    except MemoryError:
        raise
    except BaseException:
        return Score(0.0, Outcome.ERROR, message=traceback.format_exc())


def _chunks(count: int, size: int, workers: int) -> list[list[int]]:
    """Numbers below `count` in runs of at most `size`, at least one for each worker where there are enough."""
    size = max(1, min(size, -(-count // workers)))
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _name(score: Score, index: int, item: ScoreItem) -> Score:
    """A failure's message with the sample in front."""
    if not score.failed:
        return score
    sample = (
        f"sample {index} of the batch (data_source {item.data_source}, index {item.extra_info.get('index')}, "
        f"ground truth {str(item.ground_truth)[:80]!r}), whose text ends {item.solution_str[-100:]!r}"
    )
    return Score(score.value, score.outcome, score.extra, f"{sample}\n{score.message}")
