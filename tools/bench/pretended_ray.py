"""Ray as the driver calls it, without processes: a stand-in that counts what goes through it.

Invariant: what the driver pickles, copies and reads back is done for real, and what a rank would do
is not counted: `Meter.nobody` is on the clock meanwhile. Objects that are put are pickled as Ray
does, with buffers of their own copied once; so are arguments of calls and results.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from ray import cloudpickle

NOBODY = "nobody"
REST = "rest"
ASIDE = "aside: "
"""Before the labels of what other threads than the driver's own do."""


class _Thread(threading.local):
    """Where one thread is: since when, by its own processor time, and in which labels."""

    def __init__(self, clock: Callable[[], float], main: threading.Thread) -> None:
        self.since, self.stack = clock(), [REST]
        self.prefix = "" if threading.current_thread() is main else ASIDE


class Meter:
    """The driver's processor seconds and bytes by label: a moment counts for the innermost one.

    Those of other threads than the one that made the meter are labeled as `ASIDE`.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._thread = _Thread(clock, threading.current_thread())
        self._since_all = time.process_time()
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        """Bytes and calls, by name."""

    def _account(self) -> None:
        now, thread = self._clock(), self._thread
        label = thread.stack[-1]
        self.seconds[label if label == NOBODY else thread.prefix + label] += now - thread.since
        thread.since = now

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Count the body for `name`, except what is labeled inside."""
        self._account()
        # What a pretended rank calls of the package is the rank's.
        stack = self._thread.stack
        stack.append(NOBODY if stack[-1] == NOBODY else name)
        try:
            yield
        finally:
            self._account()
            stack.pop()

    def nobody(self) -> Any:
        """What the driver would not do."""
        return self.label(NOBODY)

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and counts since the last time, without those of nobody."""
        self._account()
        now = time.process_time()
        unseen = now - self._since_all - self.seconds.total()
        seconds = {name: s for name, s in self.seconds.most_common() if name != NOBODY}
        # Threads that nothing is labeled in, such as those that read what scorers answer.
        seconds[f"{ASIDE}{REST}"] = seconds.get(f"{ASIDE}{REST}", 0.0) + max(0.0, unseen)
        counts = dict(self.counts)
        self.seconds.clear()
        self.counts.clear()
        self._since_all = now
        return seconds, counts

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function`, counted for `name`."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.label(name):
                return function(*args, **kwargs)

        return call


class Pickled:
    """An object as it lies in the object store."""

    def __init__(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self._head = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        self._buffers = [bytes(buffer.raw()) for buffer in buffers]
        self.bytes = len(self._head) + sum(map(len, self._buffers))

    def load(self) -> Any:
        """The object: buffers are read where they lie."""
        return pickle.loads(self._head, buffers=self._buffers)


class Ref:
    """A put object, or the result of a call."""

    def __init__(self, pickled: Pickled) -> None:
        self.pickled = pickled
        self.answers: dict[Any, Pickled] = {}
        """What pretended ranks of one replica, which all read this, answer alike."""

    def load(self) -> Any:
        """The object."""
        return self.pickled.load()

    def __reduce__(self) -> Any:
        return bytes, (28,)  # Ray's own is a number of that length


class _Method:
    def __init__(self, ray: PretendedRay, method: Callable[..., Any]) -> None:
        self._ray, self._method = ray, method

    def remote(self, *args: Any, **kwargs: Any) -> Ref:
        ray, method = self._ray, self._method
        with ray.meter.label("calls"):
            told = Pickled((args, kwargs)).bytes
        ray.meter.counts["calls"] += 1
        ray.meter.counts["bytes in calls"] += told

        with ray.meter.nobody():
            # Refs as they are: whether it reads them is the stand-in's choice.
            made = method(*args, **kwargs)
            return Ref(made if isinstance(made, Pickled) else Pickled(made))


class _Actor:
    def __init__(self, ray: PretendedRay, rank: Any) -> None:
        self._ray, self._rank = ray, rank

    def __getattr__(self, name: str) -> _Method:
        return _Method(self._ray, getattr(self._rank, name))


class _Class:
    def __init__(self, ray: PretendedRay, stand_in: Callable[..., Any]) -> None:
        self._ray, self._stand_in = ray, stand_in

    def options(self, **options: Any) -> _Class:
        return self

    def remote(self, *args: Any) -> _Actor:
        with self._ray.meter.nobody():
            return _Actor(self._ray, self._stand_in(*args))


class PretendedRay:
    """What the modules of `placement` call of Ray. A wait finds at most `wave` more calls ended."""

    def __init__(self, meter: Meter, stand_ins: dict[type, Callable[..., Any]], wave: int) -> None:
        """`stand_ins`: by an actor's class, what makes the object that answers in its place."""
        self.meter, self._stand_ins, self._wave = meter, stand_ins, wave

    def remote(self, actor: type) -> _Class:
        """As Ray's."""
        return _Class(self, self._stand_ins[actor])

    def put(self, value: Any) -> Ref:
        """As Ray's."""
        with self.meter.label("put"):
            pickled = Pickled(value)
        self.meter.counts["bytes put"] += pickled.bytes
        return Ref(pickled)

    def wait(
        self, calls: Sequence[Ref], num_returns: int, timeout: float
    ) -> tuple[list[Ref], list[Ref]]:
        """As Ray's."""
        self.meter.counts["waits"] += 1
        self.meter.counts["refs waited for"] += len(calls)
        ready = list(calls[: max(self._wave, num_returns if timeout else 1)])
        return ready, list(calls[len(ready) :])

    def get(self, call: Ref) -> Any:
        """As Ray's."""
        pickled = call.pickled
        self.meter.counts["bytes got"] += pickled.bytes
        with self.meter.label("get"):
            return pickled.load()
