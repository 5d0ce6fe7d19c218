"""What the page is told of runs: finished, still written, damaged, cut back, copied from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_server import TOKEN, Server
from written_runs import RECIPE, group, look, write_run, write_step

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.web.groups import PAGE
from gemma_grpo.types import StepRecord


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "one", 30)
    write_run(root / "two", 5, seed=1, evaluated=False)
    found = Server(root)
    yield found
    found.stop()


def test_the_list_tells_each_run_in_a_line(server: Server) -> None:
    runs = {run["name"]: run for run in server.ask("/api/runs").json["runs"]}
    one = runs["one"]
    assert (one["status"], one["step"], one["total_steps"], one["model"]) == ("finished", 30, 30, "miniature")
    assert one["reward"] == pytest.approx(3.0)
    assert one["rewards"] == pytest.approx([0.1 * step for step in range(1, 31)])
    assert one["verdict"]["tone"] == "good"
    assert runs["two"]["verdict"] is None
    assert one["sizes"]["metrics.jsonl"] > runs["two"]["sizes"]["metrics.jsonl"] > 0


def test_a_run_tells_alarms_pace_and_evaluation(server: Server) -> None:
    run = server.ask("/api/runs/one").json
    assert [alarm["step"] for alarm in run["alarms"]] == [30]
    assert run["pace"] == {"rollout": 1.0, "update": 3.0}
    assert run["evaluation"] == [{"title": "gold", "cell": ["0.70", "(+0.20 [0.10, 0.30])"]}]
    assert run["recipe"] == RECIPE.format(seed=0)
    assert run["data"] == {"rows": 40}
    assert any("Gold was highest" in line for line in run["parting"])


def test_groups_can_be_walked_from_the_first_step_to_the_last(server: Server) -> None:
    newest = server.ask("/api/runs/one/groups").json
    assert (newest["step"], newest["previous"], newest["next"], newest["first"]) == (30, 29, None, 1)
    group = newest["groups"][0]
    assert [one["reward"] for one in group["completions"]] == [0.75, 0.25]  # the best first
    assert [one["spread"] for one in newest["groups"]] == [0.5, 0.0, 0.5]
    assert server.ask("/api/runs/one/groups?step=1").json["previous"] is None
    assert server.ask("/api/runs/one/groups?step=0").json["step"] == 1
    assert server.ask("/api/runs/one/groups?step=99").json["step"] == 30
    walked, step = [], 30
    while step is not None:
        walked.append(step)
        step = server.ask(f"/api/runs/one/groups?step={step}").json["previous"]
    assert walked == list(range(30, 0, -1))


@pytest.mark.parametrize(
    ("which", "source", "prompts"),
    [
        ("all", "", 90),
        ("zero variance", "", 30),
        ("cut off", "", 30),
        ("not scored", "", 0),
        ("all", "harmless", 30),
        ("zero variance", "harmless", 0),
    ],
)
def test_a_filter_lets_through_all_that_it_names_newest_first(server: Server, which: str, source: str, prompts: int) -> None:
    seen, before = [], ""
    while True:
        found = server.ask(f"/api/runs/one/samples?filter={which.replace(' ', '%20')}&source={source}{before}").json
        assert len(found["groups"]) <= PAGE
        seen += [(one["step"], one["prompt_id"]) for one in found["groups"]]
        if found["before"] is None:
            break
        before = f"&before={found['before']}"
    assert len(seen) == len(set(seen)) == prompts
    assert [step for step, _ in seen] == sorted((step for step, _ in seen), reverse=True)
    assert found["sources"] == ["harmless", "helpful"]


def test_replies_are_ranked_by_what_changed(server: Server) -> None:
    best = server.ask("/api/runs/one/changed?order=most%20improved").json
    # gold: reply 0 gains 0.01 a step, reply 1 loses 0.02
    assert [pair["after"]["prompt_id"] for pair in best["pairs"]] == ["h0", "h1"]
    assert best["pairs"][0]["prompt"] == [{"role": "user", "content": "held-out question 0"}]
    suspicious = server.ask("/api/runs/one/changed?order=most%20suspicious").json
    assert [pair["after"]["prompt_id"] for pair in suspicious["pairs"]] == ["h1", "h0"]
    assert (suspicious["steps"], suspicious["count"], suspicious["next"]) == ([0, 30], 2, None)


def test_charts_overlay_runs_and_hold_their_numbers(server: Server) -> None:
    panels = {panel["key"]: panel for panel in server.ask("/api/panels?run=one&run=two").json["panels"]}
    assert {"reward", "kl", "loss", "look:gold", "look:proxy"} <= set(panels)
    assert next(iter(panels)) == "reward"
    drawn = server.ask("/api/chart?run=one&run=two&key=reward")
    svg = drawn.body.decode()
    assert "&quot;label&quot;: &quot;two&quot;" in svg
    assert "style=" not in svg
    sizes = {run["name"]: run["sizes"] for run in server.ask("/api/runs").json["runs"]}
    version = "-".join(f"{sizes[name]['metrics.jsonl']}.{sizes[name]['witnesses.jsonl']}" for name in ("one", "two"))
    assert drawn.headers["etag"] == f'"{version}"'
    assert server.ask("/api/chart?run=one&key=look:none").status == 404


def test_comparison_names_the_settings_that_differ(server: Server) -> None:
    found = server.ask("/api/compare?run=one&run=two").json
    assert found["settings"] == [{"name": "seed", "values": [0, 1]}]
    assert found["evaluation"] == [{"title": "gold", "cells": [["0.70", "(+0.20 [0.10, 0.30])"], None]}]


def test_the_report_is_made_anew_not_served_from_the_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 2)
    (tmp_path / "one" / "report.html").write_text("<script>planted</script>", encoding="utf-8")
    server = Server(tmp_path)
    answer = server.ask("/report/one")
    assert answer.status == 200
    assert b"planted" not in answer.body
    assert b"one" in answer.body
    server.stop()


# ---- while a run is written


def live_run(path: Path) -> RunDirectory:
    return RunDirectory.create(path, RECIPE.format(seed=0), {"status": "running", "started": time.time(), "total_steps": 9})


def test_progress_tells_how_far_a_run_has_come_and_a_cut_log(tmp_path: Path) -> None:
    with live_run(tmp_path / "run") as run:
        server = Server(tmp_path)

        def told(after: int) -> dict[str, Any]:
            found: dict[str, Any] = server.ask(f"/api/runs/run/progress?after={after}").json
            assert found["sizes"] == {
                name: (run.path / name).stat().st_size for name in ("metrics.jsonl", "witnesses.jsonl", "events.jsonl")
            }
            return found

        run.append_look(look(0))
        write_step(run, 1)
        offsets = run.offsets()
        assert (told(0)["status"], told(0)["reset"]) == ("running", False)
        write_step(run, 2)
        known = told(offsets["metrics.jsonl"])["sizes"]["metrics.jsonl"]
        assert known > offsets["metrics.jsonl"]
        assert not told(known)["reset"]
        run.truncate(offsets)  # as a resume does
        assert told(known)["reset"]
        server.stop()


def test_the_stream_tells_what_is_new_and_a_browser_that_comes_back_that_the_log_was_cut(tmp_path: Path) -> None:
    with live_run(tmp_path / "run") as run:
        write_step(run, 1)
        server = Server(tmp_path)

        def events(last: str) -> socket.socket:
            talk = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            head = f"GET /api/runs/run/events HTTP/1.1\r\nHost: localhost:{server.port}\r\nCookie: gemma-grpo-{server.port}={TOKEN}\r\n"
            talk.sendall(f"{head}{last}\r\n".encode())
            return talk

        def next_event(talk: socket.socket) -> tuple[str, dict[str, Any]]:
            text = b""
            while not (match := re.search(rb"id: (\d+)\r\nevent: progress\r\ndata: (.*?)\r\n\r\n", text)):
                text += talk.recv(65536)
            return match[1].decode(), json.loads(match[2])

        def size() -> int:
            return (run.path / "metrics.jsonl").stat().st_size

        talk = events("")
        place, told = next_event(talk)  # where it stands comes at once
        assert (int(place), told["sizes"]["metrics.jsonl"], told["reset"]) == (size(), size(), False)
        offsets = run.offsets()
        write_step(run, 2)
        place, told = next_event(talk)
        assert (int(place), told["reset"]) == (size(), False)
        run.truncate(offsets)
        _, told = next_event(talk)
        assert told["reset"]
        talk.close()
        _, told = next_event(events(f"Last-Event-ID: {place}\r\n"))
        assert told["reset"]
        server.stop()


def test_a_run_says_whether_anyone_still_writes_it(tmp_path: Path) -> None:
    run = live_run(tmp_path / "run")
    write_step(run, 1)
    server = Server(tmp_path)

    def said() -> str:
        return str(server.ask("/api/runs").json["runs"][0]["status"])

    assert said() == "running"
    old = time.time() - 500
    for name in ("metrics.jsonl", "events.jsonl", "run.json", "recipe.yaml"):
        os.utime(run.path / name, (old, old))
    assert said() == "silent"
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout
    (run.path / ".writer").write_text(f"process {ended.strip()} on host {socket.gethostname()}\n")
    assert said() == "interrupted"
    (run.path / ".writer").write_text("process 1 on host some-other-machine\n")
    assert said() == "elsewhere"
    (run.path / ".writer").unlink()
    assert said() == "interrupted"
    run.ended(1, ValueError("it broke"))
    line = server.ask("/api/runs").json["runs"][0]
    assert (line["status"], line["status_text"]) == ("failed", "ValueError: it broke")
    run.close()
    server.stop()


# ---- what is missing or damaged


def damages(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in sorted(run.rglob("*")) if path.is_file() and not path.name.startswith(".")]


ADDRESSES = [
    *("/api/runs", "/api/runs/one", "/api/runs/one/groups", "/api/runs/one/groups?step=1", "/api/runs/one/samples"),
    *("/api/runs/one/progress", "/api/runs/one/changed", "/api/panels?run=one", "/api/chart?run=one&key=reward"),
    "/api/compare?run=one&run=two",
]  # fmt: skip
DAMAGE = [
    b"",
    b"\0" * 50,
    b"[1, 2]\n",
    b'{"a": 1',
    b"\xff\xfe\n",
    b'{"step": 1e999, "prompt": 3, "completions": {"a": 1}, "metrics": 5, "replies": 7}\n',
    b"{}\n" * 3,
    b'{"step": []}\n',
    b'{"step": 1, "reward": -1e999, "prompt": [{"role": "\\ud800", "content": "\\udfff"}], "completions": [{"text": "\\ud800"}]}\n',
]


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "witnesses.jsonl", "events.jsonl", "evaluation.json"]
)
def test_no_damaged_or_missing_file_breaks_a_page(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "one", 2)
    write_run(tmp_path / "two", 2)
    server = Server(tmp_path)
    for content in (None, *DAMAGE):
        (tmp_path / "one" / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "one" / name).write_bytes(content)
        for address in ADDRESSES:
            answer = server.ask(address)
            assert answer.status in (200, 404 if "chart" in address else 200), (name, content, address, answer.body[:300])
    server.stop()


def test_an_empty_folder_and_a_vanished_run_are_told(tmp_path: Path) -> None:
    server = Server(tmp_path)
    assert server.ask("/api/runs").json["runs"] == []
    write_run(tmp_path / "one", 2)
    assert server.ask("/api/runs/one").status == 200
    shutil.rmtree(tmp_path / "one")
    for address in ADDRESSES[1:]:
        assert server.ask(address).status == 404, address
    server.stop()


def test_one_run_alone_can_be_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 2)
    write_run(tmp_path / "two", 2)
    server = Server(tmp_path / "one")
    assert [run["name"] for run in server.ask("/api/runs").json["runs"]] == ["one"]
    assert server.ask("/api/runs/two").status == 404
    server.stop()


def test_long_logs_open_at_once(tmp_path: Path) -> None:
    """200 MB of groups: the first page of each view within two seconds."""
    with live_run(tmp_path / "run") as run:
        write_step(run, 1)
        run.append_metrics(StepRecord(2, {}, {"reward": 1.0}))
        run.append_samples(2, [group(2, "x" * 20_000)])
        line = (run.path / "samples.jsonl").read_bytes().splitlines(keepends=True)[-1]
        with (run.path / "samples.jsonl").open("ab") as log:
            for step in range(3, 3 + int(200e6) // len(line) + 1):
                log.write(line.replace(b'"step": 2', b'"step": %d' % step))
        server = Server(tmp_path)
        for address in (
            "/api/runs",
            "/api/runs/run",
            "/api/runs/run/groups",
            "/api/runs/run/groups?step=2000",
            "/api/runs/run/samples?filter=zero%20variance",
        ):
            began = time.monotonic()
            assert server.ask(address).status == 200
            assert time.monotonic() - began < 2, address  # the bound
        assert server.ask("/api/runs/run/groups?step=2000").json["step"] == 2000
        scanned = server.ask("/api/runs/run/samples?filter=zero%20variance").json
        assert scanned["groups"] == []
        assert scanned["before"] > 100e6  # it stopped, and says where
        assert server.ask("/report/run").status == 413
        server.stop()


def test_the_first_page_comes_within_a_second_and_without_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 2)
    code = """
import sys, threading, time, urllib.request
from gemma_grpo.monitor.web.runs import Runs
from gemma_grpo.monitor.web import serve
sock, port = serve.listen(serve.Place(port=0))
server = serve.server(Runs.at(__import__("pathlib").Path(sys.argv[1])), hosts=[f"127.0.0.1:{port}"], token="t" * 16, port=port)
threading.Thread(target=lambda: server.run(sockets=[sock]), daemon=True).start()
while not server.started:
    time.sleep(0.005)
for path in ("/?token=" + "t" * 16, "/api/runs", "/api/runs/one", "/api/runs/one/groups"):
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Cookie": f"gemma-grpo-{port}=" + "t" * 16})
    assert urllib.request.urlopen(asked).status == 200
found = [name for name in ("torch", "matplotlib", "transformers") if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
