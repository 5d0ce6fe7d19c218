"""The page's real server on a port of its own, and what it answers."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_grpo.monitor.web import serve
from gemma_grpo.monitor.web.runs import Runs

TOKEN = "abcdefghijklmnop0123"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """The real server on a port of its own, in a thread."""

    def __init__(self, root: Path) -> None:
        sock, self.port = serve.listen(serve.Place(port=0))
        hosts = serve.allowed_hosts(serve.Place(), self.port)
        self.server = serve.server(Runs.at(root), hosts=hosts, token=TOKEN, port=self.port)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[sock]), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def ask(self, path: str, *, method: str = "GET", headers: dict[str, str] | None = None, known: bool = True) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        cookie = {"Cookie": f"gemma-grpo-{self.port}={TOKEN}"} if known else {}
        connection.request(method, path, headers={**cookie, **(headers or {})})
        response = connection.getresponse()
        answer = Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        connection.close()
        return answer

    def raw(self, content: bytes, wait: float = 5.0) -> bytes:
        """Whatever comes back for these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as talk:
            talk.sendall(content)
            answer = b""
            try:
                while piece := talk.recv(65536):
                    answer += piece
                    if b"\r\n\r\n" in answer:
                        break
            except (TimeoutError, ConnectionResetError):
                pass
        return answer

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
