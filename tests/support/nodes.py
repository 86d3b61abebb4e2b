"""Machines of a cluster on this one.

Each a network, a host name, a /dev/shm and (but the first) processes of its own.

Invariant: they end with the process that made them; nothing of theirs is seen or changed outside.
Needs root.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SSH = """#!/bin/bash
# ssh [-o OPTION]... NODE COMMAND...
while [[ $1 == -o ]]; do shift 2; done
. "{folder}/$1"
exec nsenter --target "$node" --net --uts --mount --pid --wd=/ -- env "${{settings[@]}}" "${{@:2}}"
"""


def possible() -> bool:
    """Whether this process may make namespaces with networks between them."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    made = "ip link add br0 type bridge && ip link add link0 type veth peer name link1"
    return (
        subprocess.run(
            ["unshare", "--net", "bash", "-c", made], capture_output=True, check=False
        ).returncode
        == 0
    )


@dataclass
class Network:
    """A switch, and the nodes on it."""

    folder: Path
    """Of the `ssh` that reaches them."""
    stack: ExitStack
    switch: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    """Process that holds each node's namespaces."""

    def add(
        self,
        name: str,
        shared_processes: bool = False,
        hide: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a node at 10.77.0.N, or a lost one anew; `hide` is a folder that is empty there.

        `environment` is what a command finds that comes by `ssh`.
        """
        number = list(self.nodes).index(name) if name in self.nodes else len(self.nodes)
        spaces = [] if shared_processes else ["--pid", "--mount-proc"]
        mounts = "mount -t tmpfs tmpfs /dev/shm" + (
            f" && mount -t tmpfs tmpfs {hide}" if hide else ""
        )
        script = f"hostname {name} && {mounts} && echo ready && exec sleep infinity"
        command = [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            *spaces,
            "--fork",
            "--kill-child",
            "bash",
            "-c",
            script,
        ]
        holder = self.stack.enter_context(_process(command))
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        self.nodes[name] = psutil.Process(holder.pid).children()[0].pid
        settings = shlex.join(f"{key}={value}" for key, value in (environment or {}).items())
        (self.folder / name).write_text(f"node={self.nodes[name]}\nsettings=({settings})\n")
        link = f"link{number}-{holder.pid}"[:15]
        self._on_switch(f"ip link add {link} type veth peer name eth0 netns {self.nodes[name]}")
        self._on_switch(f"ip link set {link} master br0 up")
        address = f"ip addr add 10.77.0.{number + 1}/24 dev eth0"
        address += " && ip link set eth0 up && ip link set lo up"
        # Nobody is there; but Ray learns a node's own address from the route to elsewhere.
        subprocess.run(
            self.enter(name, "bash", "-c", f"{address} && ip route add default via 10.77.0.254"),
            check=True,
        )

    def enter(self, name: str, *command: str) -> list[str]:
        """The command line that runs a command on a node, in this process's folder."""
        holder = self.nodes[name]
        own = os.readlink(f"/proc/{holder}/ns/pid") != os.readlink("/proc/self/ns/pid")
        # Without processes of its own the command takes nsenter's place, and so gets its signals.
        spaces = ["--net", "--uts", "--mount", *["--pid"] * own, f"--wd={os.getcwd()}"]
        return ["nsenter", "--target", str(holder), *spaces, "--", *command]

    def lose(self, name: str) -> None:
        """Take a node away at once, with all its processes."""
        psutil.Process(self.nodes[name]).kill()

    def environment(self) -> dict[str, str]:
        """With the `ssh` that reaches the nodes."""
        return {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}"}

    def _on_switch(self, command: str) -> None:
        subprocess.run(
            ["nsenter", "--target", str(self.switch), "--net", "--", *command.split()], check=True
        )


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A switch without nodes; `folder` is for its files."""
    with ExitStack() as stack:
        made = Network(folder, stack)
        script = (
            "ip link add br0 type bridge && ip link set br0 up && echo ready && exec sleep infinity"
        )
        switch = stack.enter_context(_process(["unshare", "--net", "bash", "-c", script]))
        assert switch.stdout is not None and switch.stdout.readline() == "ready\n"
        made.switch = switch.pid
        (folder / "ssh").write_text(SSH.format(folder=folder))
        (folder / "ssh").chmod(0o755)
        yield made


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            deadline = time.monotonic() + 10
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
