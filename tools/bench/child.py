"""An object in a process of its own, for benchmarks whose sides must not share one.

Invariant: a child ends with its parent, and an error in it is raised in the parent, which otherwise
waits for no answer longer than `ANSWER_S`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from rlhf3d.parallel.platform import CPUPlatform

ANSWER_S = 900.0


def serve(make: Callable[[Any], Any], argument: Any, threads: int, pipe: Connection) -> None:
    """Life of a child: build the object, then call its methods as told."""
    import torch

    torch.set_num_threads(threads)
    try:
        target = make(argument)
        pipe.send((True, None))
        while (order := pipe.recv()) is not None:
            method, args = order
            pipe.send((True, getattr(target, method)(*args)))
    except EOFError:  # the parent is gone
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))
    # Libraries print pages about what they leave behind when an interpreter ends in order.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Child:
    """Makes `make(argument)` in a process with that many threads of torch, and calls it there."""

    def __init__(self, make: Callable[[Any], Any], argument: Any, threads: int = 1) -> None:
        # Inherited: a child has imported torch, for what it unpickles, before `serve` is called.
        os.environ.update(CPUPlatform("benchmark").thread_settings(threads))
        context = multiprocessing.get_context("spawn")
        self._name = getattr(make, "__name__", str(make))
        self.pipe, theirs = context.Pipe()
        arguments = (make, argument, threads, theirs)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the child

    def start(self, method: str, *args: Any) -> None:
        """Begin a call; `wait` ends it."""
        self.pipe.send((method, args))

    def wait(self) -> Any:
        """What the call (or the constructor) returned; RuntimeError where it failed."""
        if not self.pipe.poll(ANSWER_S):
            raise RuntimeError(f"{self._name} gave no answer within {ANSWER_S:.0f} s")
        try:
            done, answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self._name} is gone") from None
        if not done:
            raise RuntimeError(f"{self._name} failed:\n{answer}")
        return answer

    def call(self, method: str, *args: Any) -> Any:
        """Begin a call and wait for it."""
        self.start(method, *args)
        return self.wait()

    def end(self) -> None:
        """Let the process end, and wait for that."""
        with suppress(OSError):  # it may have ended by an error
            self.pipe.send(None)
        self.process.join(30.0)
        self.process.kill()
        self.process.join()
