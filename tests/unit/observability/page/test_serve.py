"""The page over HTTP: who gets it, and what else there is to be had (nothing)."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from threading import Thread

import pytest

from rlhf3d.observability.page.render import watched_policy
from rlhf3d.observability.page.serve import PageServer, Served

DEADLINE_S = 10
SERVED = Served("<p>half a pair: \ud83d</p>", "v1", ["run: step 3"], watched_policy())


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with PageServer(0, lambda: SERVED) as made:
        thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join(DEADLINE_S)


def ask(
    server: PageServer, path: str, host: str | None = "localhost", method: str = "GET"
) -> tuple[int, str, http.client.HTTPMessage]:
    """Status, body and headers of an answer; `host`: what the request says, None: nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=DEADLINE_S)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, answer.headers


def test_the_page_and_its_version(server: PageServer) -> None:
    status, body, headers = ask(server, "/")
    assert status == 200 and body == "<p>half a pair: \\ud83d</p>"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    assert headers["Cache-Control"] == "no-store" and headers["Server"] == "rlhf3d"
    status, body, headers = ask(server, "/version")
    assert status == 200 and headers.get_content_type() == "application/json"
    assert json.loads(body) == {"version": "v1", "status": ["run: step 3"]}


@pytest.mark.parametrize("port", ["", ":1", ":8080"])
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_this_machine_may_be_called_so(server: PageServer, name: str, port: str) -> None:
    """With any port, as a tunnel has its own."""
    assert ask(server, "/version", name + port)[0] == 200


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip"]
)
def test_other_names_read_nothing(server: PageServer, host: str | None) -> None:
    for path in ("/", "/version"):
        status, body, _ = ask(server, path, host)
        assert status == 403 and "half a pair" not in body and "v1" not in body


@pytest.mark.parametrize(
    "path", ["/metrics.jsonl", "/version/", "/?x", "/../etc/passwd", "/%2e%2e/", "x", "/assets/"]
)
def test_there_is_nothing_else(server: PageServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT"])
def test_only_get(server: PageServer, method: str) -> None:
    status, body, _ = ask(server, "/", method=method)
    assert status == 501 and "half a pair" not in body


def test_only_this_machine(server: PageServer) -> None:
    """Linux has all of 127.0.0.0/8: a server of every address would answer there."""
    assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.server_port), timeout=DEADLINE_S)


def test_a_browser_that_goes_away_is_no_error(
    server: PageServer, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=DEADLINE_S) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.sendall(b"GET / HTTP/1.0\r\nHost: loc")
    assert ask(server, "/version")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_named(server: PageServer) -> None:
    with pytest.raises(ValueError, match=f"--port {server.server_port}: Address already in use"):
        PageServer(server.server_port, lambda: SERVED)
