"""Rows of the Hub that cannot be had, or not all of them: the whole text, the exit code, and no token in any text or file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import SECRET, Hub, Machine, Repository, Token, serving

ROWS = "".join(json.dumps({"prompt": f"Why is the sky {index}?"}) + "\n" for index in range(2000)).encode()
REST = (
    f" without sending complete message body (received {len(ROWS) // 2} bytes, expected {len(ROWS)})). "
    "Run the command again; if that does not help, give a file of its rows instead."
)
GATED = "ana/gated-rows"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    repositories = {
        "ana/rows": Repository({"train.jsonl": ROWS}, kind="dataset"),
        GATED: Repository({"train.jsonl": ROWS}, kind="dataset", gated=True),
        "ana/broken": Repository({"train.jsonl": b'{"prompt": "a"}\n{"prompt": '}, kind="dataset"),
    }
    tokens = {f"{SECRET}ana": Token("ana", accepted=frozenset([GATED])), f"{SECRET}bob": Token("bob")}
    with serving(Hub(repositories, tokens)) as hub:
        yield Machine(hub, tmp_path)


def stats(machine: Machine, name: str, *words: str, who: str = "ana", **environment: str) -> tuple[int, str]:
    """Exit code and stderr; Machine.run looks for the token in all that is printed."""
    done = machine.run("-m", "gemma_grpo.cli", *words, "data", "stats", name, who=who, **environment)
    return done.returncode, done.stderr


def test_a_download_of_rows_that_breaks_off_is_no_shorter_dataset(machine: Machine) -> None:
    machine.hub.cut = "train.jsonl"
    code, text = stats(machine, "ana/rows")
    assert code == 2
    assert f"error: Hub dataset ana/rows could not be read (RemoteProtocolError: peer closed connection{REST}" in " ".join(text.split())
    machine.hub.cut = ""
    code, text = stats(machine, "ana/rows", "--debug")
    assert (code, "error: " in text) == (0, False)


def test_rows_of_the_hub_that_are_no_json_are_said_to_be(machine: Machine) -> None:
    code, text = stats(machine, "ana/broken")
    assert code == 2
    assert "error: Hub dataset ana/broken could not be read (ArrowInvalid: JSON parse error: Invalid value. in row 1)." in text


@pytest.mark.parametrize(
    ("name", "who", "said"),
    [
        (GATED, "bob", "but bob has not accepted its terms of ana/gated-rows yet."),
        ("ana/nowhere", "ana", "does not exist on the Hub, or is private and ana may not read it."),
        (GATED, "eve", "the Hub does not accept the token of the variable HF_TOKEN: it is invalid or has expired."),
    ],
)
def test_a_token_is_in_no_text_and_no_file_even_with_the_trace(machine: Machine, name: str, who: str, said: str) -> None:
    code, text = stats(machine, name, "--debug", who=who)
    assert code == 4
    assert "Traceback" in text
    assert said in text
    code, offline = stats(machine, name, "--debug", who=who, HF_HUB_OFFLINE="1")
    assert code == 4
    assert f"HF_HUB_OFFLINE=1 and {name} is not in ~/hf/hub, or not all of it." in offline
    written = [path for path in machine.home.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
