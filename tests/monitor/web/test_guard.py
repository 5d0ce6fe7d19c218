"""Who may ask the page for what: foreign hosts, sites, methods and names get nothing, and every answer keeps a browser on the safe side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_requests import FOREIGN, METHODS, foreign_hosts, names_that_lead_out
from page_server import TOKEN, Server
from written_runs import write_run

from gemma_grpo.monitor.web import serve
from gemma_grpo.monitor.web.guard import POLICY

XSS = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "one", 3, XSS)
    write_run(root / "two", 2, seed=1, evaluated=False)
    outside = tmp_path_factory.mktemp("outside")
    write_run(outside / "secret", 1)
    (root / "link").symlink_to(outside / "secret")  # a folder that is a link
    write_run(root / "linked", 1)
    (root / "linked" / "samples.jsonl").unlink()
    (root / "linked" / "samples.jsonl").symlink_to(outside / "secret" / "samples.jsonl")
    found = Server(root)
    yield found
    found.stop()


PATHS = ["/", "/static/page.js", "/api/runs", "/api/runs/one", "/api/runs/one/groups", "/api/chart?run=one&key=reward", "/report/one"]
BAD_PATHS = ["/nothing", "/static/../page.py", "/static/serve.py", "/api/runs/none", "/api/chart?run=one&key=x", "/api/chart"]


@pytest.mark.parametrize("path", [*PATHS, *BAD_PATHS])
def test_every_answer_has_the_safe_headers(server: Server, path: str) -> None:
    answer = server.ask(path)
    assert (answer.status == 200) == (path in PATHS), answer
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in answer.headers if name.startswith("access-control")]
    policy = answer.headers["content-security-policy"]
    if path.startswith("/report"):
        assert "sandbox" in policy
        assert "script-src" not in policy
    else:
        assert policy == POLICY
    assert answer.headers["content-type"].split(";")[0] in (
        *("text/html", "text/plain", "text/javascript", "application/json", "image/svg+xml"),
    )


@pytest.mark.parametrize("path", [*PATHS, *BAD_PATHS])
def test_without_the_token_there_is_nothing(server: Server, path: str) -> None:
    answer = server.ask(path, known=False)
    assert answer.status == 403
    assert b"gemma-grpo watch" in answer.body
    assert "set-cookie" not in answer.headers
    wrong = server.ask(path, known=False, headers={"Cookie": f"gemma-grpo-{server.port}={TOKEN[:-1]}x"})
    assert wrong.status == 403


def test_the_token_in_the_address_of_the_page_alone_gives_the_cookie(server: Server) -> None:
    answer = server.ask(f"/?token={TOKEN}", known=False)
    assert answer.status == 200
    cookie = answer.headers["set-cookie"]
    assert cookie == f"gemma-grpo-{server.port}={TOKEN}; Path=/; HttpOnly; SameSite=Strict"
    assert server.ask("/api/runs", known=False, headers={"Cookie": cookie.split(";")[0]}).status == 200
    for path in (f"/api/runs?token={TOKEN}", f"/?token={TOKEN}x", f"//?token={TOKEN}"):
        assert server.ask(path, known=False).status == 403, path


def test_only_its_own_names_reach_the_server(server: Server) -> None:
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}", f"LocalHost:{server.port}", f"[::1]:{server.port}"):
        assert server.ask("/api/runs", headers={"Host": host}).status == 200, host
    foreign = foreign_hosts(server.port)
    assert len(foreign) >= 60
    for host in foreign:
        head = f"GET /api/runs HTTP/1.1\r\nHost: {host}\r\nCookie: gemma-grpo-{server.port}={TOKEN}\r\nConnection: close\r\n\r\n"
        status = server.raw(head.encode()).split(b" ", 2)[1]
        assert status in (b"421", b"400"), host
    twice = f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\nHost: evil.com\r\n\r\n"
    assert server.raw(twice.encode()).split(b" ", 2)[1] in (b"400", b"421")
    assert server.raw(b"GET / HTTP/1.1\r\n\r\n").split(b" ", 2)[1] == b"400"
    assert server.raw(b"GET / HTTP/1.0\r\n\r\n").split(b" ", 2)[1] in (b"400", b"421")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_reading_is_served(server: Server, method: str) -> None:
    for path in ("/", "/api/runs", "/api/runs/one", "/report/one"):
        answer = server.ask(path, method=method, headers={"Content-Type": "application/json", "Content-Length": "0"})
        assert answer.status in (400, 405), path


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites_read_nothing(server: Server, headers: dict[str, str]) -> None:
    for path in PATHS:
        assert server.ask(path, headers=headers).status == 403, path


def test_whoever_follows_a_link_from_elsewhere_sees_the_page(server: Server) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"}
    assert server.ask(f"/?token={TOKEN}", headers=followed, known=False).status == 200
    assert server.ask("/api/runs", headers=followed).status == 403


OPENING = """
import json, os, sys
from pathlib import Path
root, paths = Path(sys.argv[1]), json.loads(sys.stdin.read())
opened = []
sys.addaudithook(lambda name, arguments: opened.append(os.fspath(arguments[0])) if name in ("open", "os.scandir", "os.listdir")
                 and arguments and isinstance(arguments[0], (str, bytes, os.PathLike)) else None)
import asyncio
from gemma_grpo.monitor.web.app import Page, make_app
from gemma_grpo.monitor.web.runs import Runs
from urllib.parse import unquote
app = make_app(Page(Runs.at(root), "t" * 16))

async def ask(path):
    path, _, query = path.partition("?")
    scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(),
             "headers": [], "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 1), "root_path": ""}
    said = []
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}
    async def send(message):
        said.append(message)
    await app(scope, receive, send)
    return said[0]["status"]

statuses = [asyncio.run(ask(path)) for path in paths]
inside = {os.path.realpath(path) for path in map(os.fsdecode, opened)}
print(json.dumps({"statuses": statuses, "opened": sorted(inside)}))
"""


def test_no_name_leads_out_of_the_folder(server: Server, tmp_path: Path) -> None:
    """What the server opens while it is asked for such names is told by an audit hook, in a process of its own."""
    root = tmp_path / "runs"
    write_run(root / "one", 1)
    write_run(tmp_path / "secret", 1)
    (root / "link").symlink_to(tmp_path / "secret")
    wanted = names_that_lead_out()
    shapes = ["/api/runs/{}", "/report/{}", "/api/runs/{}/groups", "/static/{}", "/api/chart?run={}&key=reward", "/api/compare?run={}"]
    paths = [shapes[n % len(shapes)].format(name) for n, name in enumerate(wanted)] + [shapes[0].format(name) for name in wanted]
    assert len(paths) >= 200
    done = subprocess.run([sys.executable, "-c", OPENING, str(root)], input=json.dumps(paths), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    known = {path for path, status in zip(paths, found["statuses"], strict=True) if status == 200}
    assert known <= {"/api/runs/one", "/report/one", "/api/runs/one/groups"}, known
    assert set(found["statuses"]) <= {200, 400, 404}
    secret = os.path.realpath(tmp_path / "secret")
    assert not [path for path in found["opened"] if path.startswith((secret, "/etc/passwd"))]
    ours = [path for path in found["opened"] if path.startswith(os.path.realpath(tmp_path))]
    assert ours
    assert all(path.startswith(os.path.realpath(root)) for path in ours)


def test_a_run_with_a_link_out_is_no_run(server: Server) -> None:
    assert [run["name"] for run in server.ask("/api/runs").json["runs"]] == ["two", "one"]
    for name in ("link", "linked"):
        assert server.ask(f"/api/runs/{name}").status == 404


def test_other_machines_need_a_token_of_the_users_own() -> None:
    with pytest.raises(ValueError, match="--token-file"):
        serve.Place(host="0.0.0.0").check()
    with pytest.raises(ValueError, match="at least 16"):
        serve.Place(host="0.0.0.0", token="short").check()
    with pytest.raises(ValueError, match="letters and digits"):
        serve.Place(token="a" * 15 + "\r\nSet-Cookie: x").check()
    serve.Place(host="0.0.0.0", token=TOKEN).check()
    serve.Place().check()
    assert serve.is_loopback("127.0.0.1")
    assert serve.is_loopback("::1")
    assert not serve.is_loopback("0.0.0.0")
    assert not serve.is_loopback("example.com")


def test_it_listens_on_this_machine_alone_and_takes_the_next_free_port() -> None:
    first, port = serve.listen(serve.Place(port=0))
    assert first.getsockname()[0] == "127.0.0.1"
    first.listen()
    second, other = serve.listen(serve.Place(port=port))
    assert port < other <= port + serve.NEXT_PORTS
    first.close()
    second.close()
    with pytest.raises(OSError, match="--port"):
        serve.listen(serve.Place(host="192.0.2.1"))
