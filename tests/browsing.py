"""The page in a real browser: `gemma-grpo watch` as a process of its own, a tab that knows what went wrong in it, and Debian's Chromium."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_server import TOKEN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on this machine (Debian: apt-get install chromium)")


class Watched:
    """`gemma-grpo watch` as its own process, on one port, with one token."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.token_file = root, folder / "token"
        self.token_file.write_text(TOKEN, encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        words = ["watch", str(self.root), "--port", str(self.port), "--token-file", str(self.token_file)]
        self.process = subprocess.Popen([sys.executable, "-m", "gemma_grpo.cli", *words], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.link = self.process.stdout.readline().removeprefix("page: ").strip()
        while True:
            with socket.socket() as talk:
                if talk.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


class Tab:
    """A page of the browser, and all that went wrong in it."""

    def __init__(self, browser: Any, watched: Watched, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.port, self.wrong, self.foreign = watched.port, [], []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "request", lambda asked: None if asked.url.startswith(f"http://127.0.0.1:{watched.port}/") else self.foreign.append(asked.url)
        )
        self.page.goto(watched.link)

    def show(self, place: str) -> Any:
        self.page.goto(f"http://127.0.0.1:{self.port}/#/{place}")
        return self.page

    def close(self, *, but: str = "nothing is let pass") -> None:
        """Nothing went wrong but what is of no account, and nothing was asked of another machine."""
        self.context.close()
        assert not [text for text in self.wrong if not re.search(but, text)]
        assert not self.foreign


def wait_for(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)
