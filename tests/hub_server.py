"""A server on this machine that answers as the Hub does: repositories, gates, tokens and files, with the Hub's headers and words.

Statuses, X-Error-Code and X-Error-Message are those the Hub sends: 401 and 403 with GatedRepo behind a gate, 401 without a code for
what a visitor may not know of, 404 with RepoNotFound for somebody logged in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
SECRET = "hf_aSecretThatNobodyMaySee"
"""Tokens of the tests begin with it, so that one look finds any of them in an output."""

VISITOR = "Access to {kind} {repo} is restricted. You must have access to it and be authenticated to access it. Please log in."
UNLISTED = (
    "Access to {kind} {repo} is restricted and you are not in the authorized list. Visit https://huggingface.co/{repo} to ask for access."
)
PENDING = "Your request to access {kind} {repo} is awaiting a review from the repo authors."
NO_SCOPE = "Please enable access to public gated repositories in your fine-grained token settings to view this repository."
WHO_ARE_YOU = "Invalid username or password."
BAD_TOKEN = "Invalid credentials in Authorization header"


@dataclass(frozen=True)
class Token:
    """One account's token as /api/whoami-v2 describes it."""

    user: str
    name: str = "laptop"
    role: str = "read"
    reads_gated: bool = True
    accepted: frozenset[str] = frozenset()
    pending: frozenset[str] = frozenset()
    orgs: tuple[tuple[str, str], ...] = ()
    """Name and role in it."""
    scoped: tuple[tuple[str, str], ...] = ()
    """Of a fine-grained token: an owner or repository, and a permission there."""

    @property
    def facts(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": self.name, "role": self.role}
        if self.role == "fineGrained":
            scoped = [{"entity": {"name": name}, "permissions": [permission]} for name, permission in self.scoped]
            token["fineGrained"] = {"canReadGatedRepos": self.reads_gated, "global": [], "scoped": scoped}
        orgs = [{"name": name, "roleInOrg": role} for name, role in self.orgs]
        return {"type": "user", "name": self.user, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


@dataclass(frozen=True)
class Repository:
    """Files by name; gated ones are shown to those who accepted its terms, private ones to their owner."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    kind: str = "model"
    private: bool = False


@dataclass
class Hub:
    """What the server knows, and what it was asked."""

    repositories: dict[str, Repository]
    tokens: dict[str, Token] = field(default_factory=dict)
    down: bool = False
    """Answer everything with 503."""
    cut: str = ""
    """Break the connection in the middle of this file."""
    forbidden: str = ""
    """Refuse every repository to everybody with 403 and these words, and this code."""
    forbidden_code: str = ""
    mirror: bool = False
    """Know no auth-check, as plain mirrors do not."""
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were sent."""
        return {line.rpartition("/")[2] for line in self.requests if line.startswith("GET ") and "/resolve/" in line}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class _Refusal:
    status: int
    message: str
    code: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        """Nothing on stderr: the tests read it."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """What an upload is made of: a repository, how its files want to be sent, and one commit with all of them."""
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if self.hub.down:
            return self._refuse(_Refusal(503, "Service Unavailable"))
        if token is None:
            return self._refuse(_Refusal(401, WHO_ARE_YOU))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(token, json.loads(body))
        asked = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path)
        if asked is None or asked[1] not in self.hub.repositories:
            return self._refuse(_Refusal(404, "Repository not found", "RepoNotFound"))
        if asked[2] == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            return self._send(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        self.hub.repositories[asked[1]].files.update(sent)
        url = f"{self.hub.url}/{asked[1]}/commit/{COMMIT}"
        return self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _create(self, token: Token, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or token.user}/{wanted['name']}"
        if repo in self.hub.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(private=private)
        return self._send(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.hub.down:
            return self._refuse(_Refusal(503, "Service Unavailable"))
        if sent and sent not in self.hub.tokens:
            return self._refuse(_Refusal(401, BAD_TOKEN))
        token = self.hub.tokens.get(sent)
        if path == "/api/whoami-v2":
            return self._send(200, token.facts) if token else self._refuse(_Refusal(401, WHO_ARE_YOU))
        if asked := re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(/auth-check|/revision/\w+|/tree/\w+(?:/.+)?)?", path):
            return self._api(asked[1], asked[2], asked[3] or "", token)
        if asked := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            return self._file("dataset" if asked[1] else "model", asked[2], asked[3], token)
        return self._refuse(_Refusal(404, "Not found"))

    def _api(self, kind: str, repo: str, what: str, token: Token | None) -> None:
        if what == "/auth-check":
            refusal = _Refusal(404, "Not found") if self.hub.mirror else self._refusal(kind, repo, token)
            return self._refuse(refusal) if refusal else self._send(200, b"OK", "text/plain")
        if self._repository(kind, repo) is None:  # the gate does not hide what a repository is, only its files
            return self._refuse(self._missing(token))
        files = self.hub.repositories[repo].files
        if what.count("/") > 2:  # no repository here has folders
            return self._refuse(_Refusal(404, "Entry not found", "EntryNotFound"))
        if what.startswith("/tree/"):
            return self._send(200, [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files.items()])
        return self._send(200, {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def _file(self, kind: str, repo: str, name: str, token: Token | None) -> None:
        if refusal := self._refusal(kind, repo, token):
            return self._refuse(refusal)
        data = self.hub.repositories[repo].files.get(name)
        if data is None:
            return self._refuse(_Refusal(404, "Entry not found", "EntryNotFound"))
        return self._send(200, data, "application/octet-stream")

    def _repository(self, kind: str, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        return found if found and found.kind == kind else None

    def _missing(self, token: Token | None) -> _Refusal:
        return _Refusal(404, "Repository not found", "RepoNotFound") if token else _Refusal(401, WHO_ARE_YOU)

    def _refusal(self, kind: str, repo: str, token: Token | None) -> _Refusal | None:
        repository = self._repository(kind, repo)
        if self.hub.forbidden:
            return _Refusal(403, self.hub.forbidden, self.hub.forbidden_code)
        if repository is None:
            return self._missing(token)
        if not repository.gated:
            return None
        if token is None:
            return _Refusal(401, VISITOR.format(kind=kind, repo=repo), "GatedRepo")
        if token.role == "fineGrained" and not token.reads_gated:
            return _Refusal(403, NO_SCOPE)
        if repo in token.pending:
            return _Refusal(403, PENDING.format(kind=kind, repo=repo), "GatedRepo")
        return None if repo in token.accepted else _Refusal(403, UNLISTED.format(kind=kind, repo=repo), "GatedRepo")

    def _refuse(self, refusal: _Refusal) -> None:
        headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
        self._send(refusal.status, {"error": refusal.message}, headers=headers)

    def _send(self, status: int, body: Any, kind: str = "application/json", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "X-Repo-Commit": COMMIT, "ETag": f'"{_etag(data)}"', **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = bool(self.hub.cut) and self.path.endswith(f"/{self.hub.cut}")
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection |= cut


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Machine:
    """A machine with its own home and an empty cache, on which commands are run."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.cache = home / "hf" / "hub"

    def run(self, *words: str, who: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        env = kept | {"HOME": str(self.home), "HF_HOME": str(self.home / "hf"), "HF_ENDPOINT": self.hub.url, **environment}
        if who:
            env["HF_TOKEN"] = SECRET + who
        done = subprocess.run([sys.executable, *words], env=env, cwd=self.home, capture_output=True, text=True, timeout=120, check=False)
        assert SECRET not in done.stdout + done.stderr
        return done
