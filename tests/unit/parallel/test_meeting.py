"""A meeting's port is its process's from the moment it is named until the ranks have met."""

from __future__ import annotations

import ast
import socket
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from rlhf3d.parallel.meeting import host_meeting, open_meeting

ROOT = Path(__file__).parents[3]
TEN_S = timedelta(seconds=10)


def test_nobody_else_gets_the_port_and_who_comes_early_waits() -> None:
    port = open_meeting()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    answers = []
    early = threading.Thread(
        target=lambda: answers.append(
            TCPStore("127.0.0.1", port, 2, is_master=False, timeout=TEN_S).get("key")
        )
    )
    early.start()
    host_meeting(port, 10.0)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    host = TCPStore("127.0.0.1", port, 2, is_master=True, timeout=TEN_S, multi_tenant=True)
    host.set("key", "met")
    early.join(10)
    assert answers == [b"met"]


def test_another_hosts_port_is_left_alone() -> None:
    with socket.create_server(("", 0)) as other:
        host_meeting(other.getsockname()[1], 1.0)


def test_no_other_place_picks_a_port() -> None:
    """`bind(…, 0)` and letting go is a port that somebody else may have when it is used."""
    found = []
    for path in (ROOT / "rlhf3d").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("getsockname", "create_server"):
                found.append(str(path.relative_to(ROOT / "rlhf3d")))
    assert set(found) == {"parallel/meeting.py"}
