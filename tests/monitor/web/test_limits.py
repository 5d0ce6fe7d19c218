"""Too much, too slow, or nonsense: each is refused in its own way, and the server goes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
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


NUMBERS = ["-1", "1.5", "1e3", "NaN", "", " ", "0x10", "\u0661", "9" * 16, "1_0", "true", "null", "1;2", "'", "%00"]


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
    host = f"Host: localhost:{server.port}\r\n"
    broken = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
        f"GET / HTTP/1.1\r\n{host}X: {'a' * 2**20}\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\n{host}Content-Length: -1\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\n{host}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
        f"POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\nZZ\r\n".encode(),
        f"GET / HTTP/1.1\r\n{host} folded: x\r\n\r\n".encode(),
        b"GET http://evil.com/ HTTP/1.1\r\nHost: evil.com\r\n\r\n",
    ]
    for content in broken:
        try:
            answer = server.raw(content)
        except (ConnectionResetError, BrokenPipeError):
            continue
        assert answer == b"" or int(answer.split(b" ", 2)[1]) in (400, 403, 405, 421, 431), content[:60]
    assert server.ask("/api/runs").status == 200


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
