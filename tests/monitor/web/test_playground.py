"""The playground on a real run: both sides on the same weights, one at a time, blind votes, and questions that cannot be asked."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import JUDGED, TinyRun
from hostile_requests import REFUSED_POSTS
from page_server import TOKEN, Server

from gemma_grpo.grpo.playing import Player
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.votes import tally, tally_line
from gemma_grpo.monitor.web import playground
from gemma_grpo.monitor.web.guard import page_token

ASKED = [{"role": "user", "content": "tell me something"}]


@pytest.fixture(scope="module")
def finished(train_tiny: Callable[..., TinyRun], pairs_file: Path) -> TinyRun:
    return train_tiny(dataset=str(pairs_file), **JUDGED)


@pytest.fixture(scope="module")
def server(finished: TinyRun) -> Iterator[Server]:
    found = Server(finished.path)
    yield found
    found.stop()


def post(server: Server, what: str, body: Any, **headers: str | None) -> http.client.HTTPResponse:
    """What comes back, to be read as it comes. A header that is None is left out."""
    talk = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    given: dict[str, str | None] = {"Cookie": f"gemma-grpo-{server.port}={TOKEN}", "Origin": f"http://localhost:{server.port}"}
    given |= {"Content-Type": "application/json", "X-Page-Token": page_token(TOKEN)}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    talk.request(
        "POST", f"/api/runs/{run_name(server)}/{what}", content, {name: value for name, value in given.items() if value is not None}
    )
    return talk.getresponse()


def run_name(server: Server) -> str:
    return str(server.ask("/api/runs").json["runs"][0]["name"])


def played(server: Server, **question: Any) -> list[dict[str, Any]]:
    answer = post(server, "play", {"messages": ASKED, **question})
    assert answer.status == 200, answer.read()
    return [json.loads(line) for line in answer]


def reply_of(told: list[dict[str, Any]], side: str) -> dict[str, Any]:
    (reply,) = [one["reply"] for one in told if one.get("side") == side and "reply" in one]
    assert "".join(one["piece"] for one in told if one.get("side") == side and "piece" in one) == reply["text"]
    return dict(reply)


def test_both_sides_answer_as_the_player_does(server: Server, finished: TinyRun) -> None:
    told = played(server, seed=3, max_tokens=12)
    assert told[0] == {"state": "loading the model"}
    assert told[-1] == {"done": True}
    player = Player.open(finished.path)
    for side in ("base", "tuned"):
        *_, expected = player.stream(ASKED, side, seed=3, max_tokens=12)  # type: ignore[arg-type]
        assert not isinstance(expected, str)
        reply = reply_of(told, side)
        assert (reply["text"], reply["pieces"], reply["length"]) == (expected.text, list(expected.pieces), expected.length)
        assert reply["log_ratios"] == pytest.approx(expected.log_ratios, abs=1e-4)
        (opinion,) = [one["opinion"] for one in told if one.get("side") == side and "reply" in one]
        assert opinion["total"] == pytest.approx(player.opinion(ASKED, expected).total)  # type: ignore[arg-type]
    assert played(server, seed=3, max_tokens=12) == told[1:]  # loaded once, and the same again
    assert reply_of(played(server, seed=4, max_tokens=12), "tuned") != reply_of(told, "tuned")


def test_another_adapter_answers_by_its_own_weights(server: Server, finished: TinyRun) -> None:
    offered = server.ask(f"/api/runs/{run_name(server)}/playground").json
    names = [one["name"] for one in offered["choices"]]
    assert names[0] == "adapter"
    assert "step-00000001" in names
    assert offered["token"] == page_token(TOKEN)
    assert all(prompt[-1]["role"] == "user" for prompt in offered["prompts"])
    first = reply_of(played(server, checkpoint="step-00000001", temperature=0, max_tokens=4), "tuned")
    player = Player.open(finished.path, "step-00000001")
    *_, expected = player.stream(ASKED, "tuned", seed=0, temperature=0, max_tokens=4)
    assert not isinstance(expected, str)
    assert first["text"] == expected.text
    assert first["log_ratios"] == pytest.approx(expected.log_ratios, abs=1e-4)


def test_a_blind_pair_tells_nothing_before_the_vote_and_counts_once(server: Server, finished: TinyRun) -> None:
    seen = set()
    for seed in range(12):
        told = played(server, blind=True, seed=seed, max_tokens=6)
        text = json.dumps(told)
        assert not [word for word in ("base", "tuned", "log_ratios", "reward") if word in text]
        answer = post(server, "votes", {"pair": told[-1]["pair"], "choice": "first"})
        assert answer.status == 200
        found = json.loads(answer.read())
        sides = found["sides"]
        seen.add(sides["first"])
        assert {sides["first"], sides["second"]} == {"base", "tuned"}
        for name, side in sides.items():
            assert found["replies"][side]["reply"]["text"] == reply_of(told, name)["text"]
        assert post(server, "votes", {"pair": told[-1]["pair"], "choice": "first"}).status == 409
        kept = [json.loads(line) for line in (finished.path / "votes.jsonl").read_text(encoding="utf-8").splitlines()]
        assert (len(kept), kept[-1]["choice"], kept[-1]["messages"]) == (seed + 1, sides["first"], ASKED)
    assert seen == {"base", "tuned"}  # 1 in 2,048 that chance alone leaves one out
    html = server.ask(f"/report/{run_name(server)}").body.decode()
    found_tally = tally(kept)
    assert found_tally is not None
    assert tally_line(found_tally).split(":")[0] in html


def test_what_cannot_be_asked_is_refused_in_words(server: Server) -> None:
    for body, said in (
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": ASKED, "checkpoint": "../adapter"}, "no adapter"),
        ({"messages": ASKED, "seed": -1}, "seed"),
        ({"messages": ASKED, "max_tokens": 10**9}, "max_tokens"),
        ({"messages": ASKED, "temperature": 1e999}, "temperature"),
        ({"messages": ASKED, "unknown": 1}, "unknown"),
        ([1, 2], "the body"),
        (b"{", "the body"),
        (b"\xff\xfe", "the body"),
    ):
        answer = post(server, "play", body)
        assert (answer.status, said in answer.read().decode()) == (400, True), (body, said)
    for messages, said in (
        ([{"role": "user", "content": " "}], "empty"),
        ([{"role": "user", "content": "x " * 9000}], "max_prompt_length"),
    ):
        assert said in played(server, messages=messages)[-1]["error"]
    assert played(server)[-1] == {"done": True}  # and it goes on
    for body in ({"pair": "x", "choice": "tuned"}, {"choice": "tie"}, {"pair": "x", "choice": "tie", "more": 1}):
        assert post(server, "votes", body).status == 400
    assert post(server, "votes", {"pair": "nonsense", "choice": "tie"}).status == 409


@pytest.mark.parametrize(("headers", "status"), REFUSED_POSTS, ids=str)
@pytest.mark.parametrize("what", ["play", "votes"])
def test_no_other_site_makes_it_answer_or_vote(server: Server, what: str, headers: dict[str, str | None], status: int) -> None:
    assert post(server, what, {"messages": ASKED}, **headers).status == status


def test_a_question_is_not_asked_by_reading(server: Server) -> None:
    for what in ("play", "votes"):
        assert server.ask(f"/api/runs/{run_name(server)}/{what}").status == 405
    for path in ("/api/runs", "/", "/api/runs/x/playx", "/api/runs/x/votes/y"):
        assert server.ask(path, method="POST").status in (404, 405)


def test_one_answers_at_a_time_and_only_so_many_wait(server: Server, finished: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground, "MOST_WAITING", 1)
    assert played(server, max_tokens=2)[-1] == {"done": True}
    (worker,) = workers(finished.path)
    os.kill(int(worker), signal.SIGSTOP)  # an answer that takes its time
    try:
        first = post_in_background(server)
        second = post_in_background(server)
        deadline = time.monotonic() + 10
        while (refused := post(server, "play", {"messages": ASKED})).status != 429 and time.monotonic() < deadline:
            refused.close()
            time.sleep(0.1)
        assert (refused.status, "wait already" in refused.read().decode()) == (429, True)
    finally:
        os.kill(int(worker), signal.SIGCONT)
    told = [first(), second()]
    assert [one[-1] for one in told] == [{"done": True}] * 2
    assert sum("waiting" in line.get("state", "") for one in told for line in one) >= 1


def post_in_background(server: Server) -> Callable[[], list[dict[str, Any]]]:
    """Ask; what is returned waits for the answer."""
    answers: list[list[dict[str, Any]]] = []
    thread = threading.Thread(target=lambda: answers.append(played(server, max_tokens=3)))
    thread.start()
    time.sleep(0.5)

    def wait() -> list[dict[str, Any]]:
        thread.join(60)
        return answers[0]

    return wait


def test_who_leaves_calls_the_answer_off(server: Server) -> None:
    answer = post(server, "play", {"messages": ASKED, "max_tokens": 4096, "temperature": 100})
    answer.readline()
    answer.close()
    began = time.monotonic()
    assert played(server, max_tokens=2)[-1] == {"done": True}
    assert time.monotonic() - began < 30


def test_a_run_in_training_says_why_it_cannot_be_played_with(finished: TinyRun, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    with RunDirectory.open(copy):
        server = Server(copy)
        assert "beside" in played(server)[-1]["error"]
        assert played(server, beside=True, max_tokens=2)[-1] == {"done": True}
        assert workers(copy)
        server.stop()
        deadline = time.monotonic() + 10
        while workers(copy) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not workers(copy)  # the model is not left behind


def workers(run: Path) -> list[str]:
    """The processes that hold this run's model."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            found += [path.parent.name] if "gemma_grpo.grpo.play_worker" in words and str(run) in words else []
    return found


def test_votes_on_one_prompt_are_one_opinion() -> None:
    def vote(choice: str, prompt: str) -> dict[str, Any]:
        return {"choice": choice, "messages": [{"role": "user", "content": prompt}]}

    assert tally([]) is None
    assert tally([{"choice": "nonsense"}, {"choice": 3}]) is None
    found = tally([vote("tuned", "a"), vote("tuned", "a"), vote("base", "b"), vote("tie", "c")])
    assert found is not None
    # prompts: 1, 0 and 1/2
    assert (found.tuned, found.base, found.ties, found.prompts, found.count, found.rate) == (2, 1, 1, 3, 4, 0.5)
    # n = 3, p = 1/2, z^2 = 3.8415: centre 1/2; half = z sqrt(1/12 + z^2/36) / (1 + z^2/3) = 1.95996 x 0.43592 / 2.28048 = 0.37465
    assert (found.low, found.high) == pytest.approx((0.5 - 0.37465, 0.5 + 0.37465), abs=1e-4)
