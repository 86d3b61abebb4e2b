"""Ray's own processes on this machine, where the run starts them.

Invariant: signals that ask the run to stop do not reach them; the death of one that Ray needs is
found within a second and ends every wait on Ray; when `end` returns, none of them is left, and no
call starts them again.
Runs in: driver.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray._private import auto_init_hook, services
from ray._private import worker as ray_driver
from ray._private.node import Node

from rlhf3d.placement.waiting import exit_on_timeout, ray_ended, set_ray_ended
from rlhf3d.processes import find_marked, marked, stop_signals_blocked

# Besides the batches; by itself Ray takes a share of the machine's memory.
OBJECT_STORE_BYTES = 256 << 20
NEEDED = ("raylet", "gcs_server")
LEFT_OUT = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods that start the dashboard's server, the autoscaler and what reads workers' output: each is
a Python process of its own, the first is waited for, and a run on one machine uses none."""
# Linux has 108 bytes for the path of a Unix socket, the last of which is 0.
SOCKET_PATH_BYTES = 107
# With the longest process id that Linux gives.
SESSION_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12")
"""What Ray adds to its temporary folder."""
LOOK_S = 0.5
START_SHARE = 0.9
"""Of the deadline: Ray's own message is better than the one of a process that is ended."""
UNWIND_S = 10.0
"""Seconds for the driver to leave its wait on a Ray that has ended."""
END_S = 10.0
"""Seconds for Ray's processes to end by themselves."""


def _init(timeout_s: float, **settings: Any) -> None:
    """Start Ray; RuntimeError where its processes do not come up."""
    try:
        with _patience(timeout_s):
            ray.init(**settings)
    except Exception as error:
        # Ray has no class of its own for this; other mistakes have theirs.
        if type(error) is not Exception:
            raise
        load = os.getloadavg()[0]
        raise RuntimeError(
            f"Ray did not start on this machine: {error} The machine has {os.cpu_count()} CPUs and "
            f"a load of {load:.0f}: end what else runs on it, then give the same command again"
        ) from error


@contextmanager
def _patience(timeout_s: float) -> Iterator[None]:
    """Have Ray wait for the start of its node as long as a run may, instead of a fixed 30 s.

    Ray looks for the node until it is there, or 30 s are over: so one look takes longer here.
    """
    look = services.get_node
    deadline = time.monotonic() + timeout_s
    looked = False

    def wait(*arguments: Any) -> Any:
        nonlocal looked
        looked = True
        while True:
            try:
                return look(*arguments)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > deadline or "raylet" not in _own_processes():
                    raise
            time.sleep(0.1)

    services.get_node = wait
    try:
        yield
    finally:
        services.get_node = look
    assert looked, "Ray no longer looks for its node by services.get_node"


@contextmanager
def _needed_only() -> Iterator[None]:
    """Have Ray start none of `LEFT_OUT`, which it starts whatever it is told."""
    own = {name: getattr(Node, name) for name in LEFT_OUT}
    left_out: set[str] = set()

    def leave_out(name: str) -> Callable[..., None]:
        return lambda *_, **__: left_out.add(name)

    for name in own:
        setattr(Node, name, leave_out(name))
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(Node, name, method)
    assert left_out == set(LEFT_OUT), f"Ray asks only {left_out} of {LEFT_OUT}"


def _own_processes() -> set[str]:
    """Names of this process's children that run."""
    return {process.name() for process in psutil.Process().children() if _runs(process)}


class RayHere:
    """Ray's processes. Without `start`, `ended` and `end` are those of a cluster of others."""

    def __init__(self) -> None:
        # It belongs to the process: what an earlier Ray left must not end waits on this one.
        set_ray_ended(None)
        # Else a call of an actor of a Ray that has ended starts another one, which nobody ends.
        assert hasattr(auto_init_hook, "enable_auto_connect"), "Ray starts itself in another way"
        auto_init_hook.enable_auto_connect = False
        self._mark: str | None = None
        self._needed: dict[str, psutil.Process] = {}
        self._agents: set[psutil.Process] = set()
        """What the raylet started first: their titles lie where their mark was."""
        self._closing = threading.Event()
        self._looking = threading.Lock()

    def start(self, cpus: int, gpus: int | None, timeout_s: float, batch_bytes: int = 0) -> None:
        """Start Ray, connect to it, and watch it.

        It has `cpus` logical CPUs, `gpus` GPUs (None: those it finds) and room for two batches of
        `batch_bytes`.
        """
        assert hasattr(ray_driver, "print_to_stdstream"), (
            "Ray no longer prints its nodes' messages by print_to_stdstream"
        )
        ray_driver.print_to_stdstream = _log
        # Ray's processes are the children that ray.init adds.
        before = set(psutil.Process().children())
        with (
            marked() as self._mark,
            stop_signals_blocked(),
            exit_on_timeout("start Ray on this machine", timeout_s),
            _needed_only(),
        ):
            _init(
                START_SHARE * timeout_s,
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES + 2 * batch_bytes,
                _temp_dir=short_temporary_folder(),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        started = set(psutil.Process().children()) - before
        self._needed = {process.name(): process for process in started if process.name() in NEEDED}
        for process in started:
            with suppress(psutil.Error):
                self._agents.update(process.children(recursive=True))
        threading.Thread(target=self._watch, name="watch Ray", daemon=True).start()

    def ended(self) -> str | None:
        """Look at the processes now; return why Ray has ended, if it has."""
        with self._looking:  # the first that ended is the cause
            # While Ray is being ended, a process that ends is no failure.
            if self._closing.is_set() or ray_ended():
                return ray_ended()
            for name, process in self._needed.items():
                how = _how_it_ended(process)
                if how is None:
                    continue
                why = (
                    f"Ray's {name} on this machine (process {process.pid}) {how}, and with it the "
                    "run: the same command continues from its newest checkpoint"
                )
                set_ray_ended(why)
                self._kill()  # the others would only wait and write pages about it
                return why
        return None

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_S):
            # The driver, whose wait ends now, gets UNWIND_S to reach `end`.
            if (why := self.ended()) and not self._closing.wait(UNWIND_S):
                # Ray's own calls wait a minute for what is gone, and then end this process without
                # a message.
                print(why, file=sys.stderr, flush=True)
                self._kill()
                # The main thread is inside a call of Ray that no exception reaches.
                os._exit(1)

    def end(self) -> None:
        """Disconnect, end all processes, and wait for it."""
        self._closing.set()
        if self._mark is None:
            ray.shutdown()
            return
        started = self._all()
        if ray_ended():
            self._kill()
        else:
            threading.Thread(target=self._follow_raylet, daemon=True).start()
        ray.shutdown()
        wait_until_gone(started)
        self._kill()  # what was started meanwhile

    def _follow_raylet(self) -> None:
        """Kill the others once the raylet has ended.

        Ray ends its processes one after the other, and gives each a second.
        """
        deadline = time.monotonic() + END_S
        raylet = self._needed.get("raylet")
        while raylet is not None and time.monotonic() < deadline:
            if _how_it_ended(raylet):
                self._kill()
                return
            time.sleep(0.05)

    def _all(self) -> list[psutil.Process]:
        assert self._mark is not None
        return [*{*find_marked(self._mark), *self._agents}]

    def _kill(self) -> None:
        for process in self._all():
            with suppress(psutil.Error):
                process.kill()


def short_temporary_folder() -> str | None:
    """Return a folder with paths short enough for Ray's sockets; None for Ray's own choice."""
    chosen = os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    return None if len(os.fsencode(chosen)) + SESSION_BYTES <= SOCKET_PATH_BYTES else "/tmp/ray"


def _log(message: dict[str, Any], **_: object) -> None:
    """Log what Ray would print: pages of its own log where one of its processes ends."""
    logging.getLogger(__name__).warning("Ray: %s", "\n".join(message["lines"]))


def _how_it_ended(process: psutil.Process) -> str | None:
    """How a process ended, as text; None while it runs."""
    if _runs(process):
        return None
    with suppress(ChildProcessError):
        # WNOWAIT leaves the status to Ray's own code, which waits for the same children.
        status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is not None and status.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            return f"was ended by {signal.Signals(status.si_status).name}"
    return "ended"


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Wait for Ray's workers, which end when they notice that their raylet is gone; kill the rest.

    Ray's shutdown does not wait for them.
    """
    alive = _alive_after(processes, END_S)
    for process in alive:
        logging.getLogger(__name__).warning(
            "killed %d, which was left %.0f s after Ray ended", process.pid, END_S
        )
        with suppress(psutil.Error):
            process.kill()
    _alive_after(alive, END_S)


def _alive_after(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until all have ended; those that have not in time."""
    deadline = time.monotonic() + timeout_s
    while alive := [process for process in processes if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return alive


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended. One that nobody has waited for yet is a zombie: it has.

    Of a process whose parent is gone that is the container's first one, which may take a second or
    for ever.
    """
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
