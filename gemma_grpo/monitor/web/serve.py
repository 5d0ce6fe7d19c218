"""The server: where it listens, for whom, and how long it waits for a client that says nothing.

Loopback, unless a host and a token of the user's own are given.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_grpo.monitor.web.app import Page, make_app
from gemma_grpo.monitor.web.guard import Guard
from gemma_grpo.monitor.web.runs import Runs

PORT = 7860
NEXT_PORTS = 20
"""Ports that are tried after one that is taken."""
SHORTEST_TOKEN = 16
"""Characters of a token of the user's own."""
PATIENCE = 10.0
"""Seconds for a request to arrive whole, and for a connection to ask for anything."""
MOST_CONNECTIONS = 256
LARGEST_HEAD = 2**14
"""Bytes of a request's line and headers."""
SWITCH = 0.0005
"""Seconds that a thread which draws a chart may go on while another waits: Python's 5 ms, at each file read, add up to 0.4 s an answer."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the page is served and who may come in."""

    host: str = "127.0.0.1"
    port: int = PORT
    token: str | None = None
    """None makes one for this start."""
    names: tuple[str, ...] = ()
    """Further names by which browsers reach this server, such as a proxy's: host or host:port."""

    def check(self) -> None:
        """Raises ValueError where others could reach the page without a token that its user chose."""
        if not is_loopback(self.host) and self.token is None:
            raise ValueError(
                f"host {self.host} can be reached from other machines, and no token is given. "
                "Add --token-file FILE with a token of your own, or leave --host out to serve this machine alone."
            )
        if self.token is not None and (len(self.token) < SHORTEST_TOKEN or not self.token.isascii() or not self.token.isalnum()):
            raise ValueError(
                f"the token has {len(self.token)} characters; it needs at least {SHORTEST_TOKEN} letters and digits. "
                'Make one by `python3 -c "import secrets; print(secrets.token_hex(16))"`.'
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Protocol(H11Protocol):
    """uvicorn's HTTP, but a connection that has not asked for anything, or not to its end, is closed in PATIENCE seconds.

    Where there are MOST_CONNECTIONS, a new one takes the place of the one that has been silent longest.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= MOST_CONNECTIONS - 1:  # uvicorn answers 503 from MOST_CONNECTIONS on
            silent = [other for other in self.connections if isinstance(other, _Protocol) and other.cycle is None]
            if silent:
                min(silent, key=lambda other: other._wait.when()).put_out()
        super().connection_made(transport)
        self._wait = self.loop.call_later(PATIENCE, self._give_up)

    def put_out(self) -> None:
        """Close it, and count it no more."""
        self.connections.discard(self)
        self.transport.abort()

    def _give_up(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._wait = self.loop.call_later(PATIENCE, self._give_up)
        elif not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """uvicorn's server, for which a signal is the usual end: its own would raise it again for whoever asked before."""

    def __init__(self, config: uvicorn.Config, page: Page) -> None:
        super().__init__(config)
        self._page = page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let go of the playground's process, too."""
        self._page.close()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(place: Place) -> tuple[socket.socket, int]:
    """A socket on the port, or on the next that is free. Raises OSError where the host is none of this machine's, or all are taken."""
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    for port in range(place.port, place.port + NEXT_PORTS + 1):
        taken = socket.socket(family, socket.SOCK_STREAM)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((place.host, port))
        except OSError as error:
            taken.close()
            if error.errno != errno.EADDRINUSE or port == place.port + NEXT_PORTS or not place.port:
                raise OSError(error.errno, f"{place.host}:{port}: {error.strerror}. Name another port by --port.") from error
        else:
            return taken, taken.getsockname()[1]
    raise AssertionError


def serve(path: Path, place: Place, said: Callable[[str], None]) -> None:
    """Serve the runs of a folder until stopped; `said` is told the link, and what is to be known. Raises ValueError, OSError before."""
    place.check()
    found = Runs.at(path)
    sock, port = listen(place)
    token = place.token or secrets.token_urlsafe(24)
    if port != place.port and place.port:
        said(f"port {place.port} is in use; using {port}")
    shown = socket.gethostname() if place.host in ("0.0.0.0", "::") else _in_url(place.host)
    said(f"page: http://{shown}:{port}/?token={token}")
    sys.setswitchinterval(SWITCH)
    server(found, hosts=allowed_hosts(place, port), token=token, port=port).run(sockets=[sock])


def allowed_hosts(place: Place, port: int) -> list[str]:
    """Values of the Host header that are this server's own. Where it listens everywhere, those are this machine's names and addresses."""
    addresses = [place.host]
    if is_loopback(place.host):
        addresses += ["127.0.0.1", "localhost", "::1"]
    elif place.host in ("0.0.0.0", "::"):
        name = socket.gethostname()
        addresses = ["127.0.0.1", "localhost", "::1", name, socket.getfqdn(), *_addresses(name)]
    return [*(f"{_in_url(address)}:{port}" for address in dict.fromkeys(addresses)), *place.names]


def _addresses(name: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def server(found: Runs, *, hosts: Sequence[str], token: str, port: int) -> uvicorn.Server:
    """A server of these runs, not yet listening."""
    page = Page(found, token)
    app: Any = Guard(make_app(page), hosts=hosts, token=token, port=port)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_level="error",  # what strangers send that is no HTTP is theirs, and no line of this terminal
        access_log=False,  # addresses hold the token
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=LARGEST_HEAD,
        proxy_headers=False,
    )
    return _Server(config, page)
