"""Too much, too slow, or nonsense: each is refused in its own way, and the server goes on."""

from __future__ import annotations

import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from hostile_requests import NUMBERS, broken_requests
from page_server import TOKEN, Server
from written_runs import write_run

from gemma_grpo.monitor.web import serve, stream


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root: Path = tmp_path_factory.mktemp("runs")
    write_run(root / "one", 3)
    write_run(root / "two", 2)
    found = Server(root)
    yield found
    found.stop()


def test_numbers_that_are_none_are_refused_and_large_ones_answered(server: Server) -> None:
    for text in NUMBERS:
        for shape in ("groups?step={}", "samples?before={}", "changed?start={}", "progress?after={}"):
            answer = server.ask(f"/api/runs/one/{shape.format(quote(text))}")
            assert answer.status == 400, (shape, text)
    for shape in ("groups?step={}", "samples?before={}", "changed?start={}", "progress?after={}"):
        assert server.ask(f"/api/runs/one/{shape.format('9' * 15)}").status == 200
    assert server.ask("/api/runs/one/samples?filter=x").status == 400
    assert server.ask("/api/runs/one/changed?order=x").status == 400
    assert server.ask("/api/panels?" + "&".join(["run=one", "run=two"] * 3)).status == 200
    assert server.ask("/api/panels?" + "&".join(f"run={n}" for n in range(5))).status == 400
    assert server.ask("/api/runs?" + "x" * 5000).status == 414


def test_broken_requests_are_refused_and_the_server_lives(server: Server) -> None:
    for content in broken_requests(server.port):
        try:
            answer = server.raw(content, wait=0.5)
        except (ConnectionResetError, BrokenPipeError):
            continue
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]
        assert set(statuses) <= {400, 403, 405, 413, 414, 421, 431}, (content[:80], statuses)
        assert len(answer) < 5000, content[:80]
    assert server.ask("/api/runs").status == 200


def test_a_head_of_ten_megabytes_is_not_kept(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as talk, suppress(ConnectionError):
        talk.sendall(f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\n".encode())
        for _ in range(160):
            talk.sendall(b"X: " + b"a" * 65530 + b"\r\n")
        pytest.fail("ten megabytes of headers were taken")
    assert server.ask("/api/runs").status == 200


def test_a_thousand_connections_that_say_nothing_shut_nobody_out(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    talks = []
    try:
        for count in range(1, 1001):
            talks.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            if count % 250 == 0:
                assert server.ask("/api/runs").status == 200
        assert len(server.server.server_state.connections) <= serve.MOST_CONNECTIONS
    finally:
        for talk in talks:
            talk.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_says_nothing_or_does_not_end_is_put_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE", 0.5)
    for content in (b"", b"GET / HT", f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\nX: ".encode()):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as talk:
            talk.sendall(content)
            began = time.monotonic()
            while talk.recv(65536):
                pass
            assert time.monotonic() - began < 5, content
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as talk:  # a drop now and then does not buy time
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < 8:
                talk.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - began < 8


def test_a_stream_is_not_put_out_and_there_are_only_so_many(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE", 0.3)
    monkeypatch.setattr(stream, "MOST_STREAMS", 2)
    head = (
        f"GET /api/runs/one/events HTTP/1.1\r\nHost: localhost:{server.port}\r\nCookie: gemma-grpo-{server.port}={TOKEN}\r\n\r\n".encode()
    )
    talks = []
    for _ in range(2):
        talk = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        talk.sendall(head)
        assert b"200 OK" in talk.recv(65536)
        talks.append(talk)
    time.sleep(1)
    assert server.ask("/api/runs/one/events").status == 503
    for talk in talks:
        talk.setblocking(False)
        try:
            rest = talk.recv(1 << 20)
        except BlockingIOError:
            rest = b"open"
        assert rest  # not closed
        talk.close()
    deadline = time.monotonic() + 10
    while server.server.server_state.connections and time.monotonic() < deadline:
        time.sleep(0.05)
    talk = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    talk.sendall(head)
    assert b"200 OK" in talk.recv(65536)  # the places of those that left are free again
    talk.close()
