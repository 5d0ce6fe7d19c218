"""Uploading: refused before anything expensive where the token may not write, and whole where it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import JUDGED, TinyRun
from hub_server import SECRET, Hub, Machine, Token, serving

MINE, ORG, THEIRS = "alice/aligned", "lab/aligned", "bob/aligned"

TOKENS = {
    "writer": Token("alice", "desk", "write", orgs=(("lab", "write"), ("club", "read"))),
    "reader": Token("alice", "phone", "read"),
    "fine": Token("alice", "fine", "fineGrained", scoped=(("alice", "repo.write"),)),
    "fine-one": Token("alice", "one", "fineGrained", scoped=((MINE, "repo.content.write"),)),
    "fine-reads": Token("alice", "looks", "fineGrained", scoped=(("alice", "repo.content.read"),)),
}
CHECK = "import sys; from gemma_grpo.cli.app import run; sys.exit(run(sys.argv[1:]))"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub({}, {SECRET + name: token for name, token in TOKENS.items()})) as hub:
        yield hub


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    (tmp_path / "home").mkdir()
    return Machine(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def finished(train_tiny: Callable[..., TinyRun], pairs_file: Path) -> TinyRun:
    return train_tiny(dataset=str(pairs_file), **JUDGED)


ASK = "import sys; from gemma_grpo.upload import check_write_access; check_write_access(sys.argv[1])"


@pytest.mark.parametrize(
    ("who", "repository", "refusal"),
    [
        ("writer", MINE, ""),
        ("writer", ORG, ""),
        ("fine", MINE, ""),
        ("fine-one", MINE, ""),
        ("writer", THEIRS, "may not write to repositories of bob"),
        ("writer", "club/aligned", "may not write to repositories of club"),
        ("reader", MINE, 'your token "phone" may not write'),
        ("fine-reads", MINE, 'your token "looks" may not write'),
        ("fine-one", "alice/other", 'your token "one" may not write'),
        ("", MINE, "you have none"),
        ("stranger", MINE, "does not accept your token"),
    ],
)
def test_whether_a_token_writes_is_asked_of_the_hub(machine: Machine, who: str, repository: str, refusal: str) -> None:
    done = machine.run("-c", ASK, repository, who=who)
    assert (refusal in done.stderr) if refusal else (done.returncode == 0), done.stderr


def test_a_hub_that_does_not_answer_is_no_permission(hub: Hub, machine: Machine) -> None:
    hub.down = True
    assert "when asked who you are" in machine.run("-c", ASK, MINE, who="writer").stderr
    assert "HF_HUB_OFFLINE" in machine.run("-c", ASK, MINE, who="writer", HF_HUB_OFFLINE="1").stderr


def test_an_export_is_uploaded_whole_and_private(hub: Hub, machine: Machine, finished: TinyRun) -> None:
    done = machine.run(
        "-c", CHECK, "export", str(finished.path), "--to", f"hub:{MINE}", "--output", str(machine.home / "out"), who="writer"
    )
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.url}/{MINE}" in done.stdout
    repository = hub.repositories[MINE]
    assert repository.private
    assert repository.files == {path.name: path.read_bytes() for path in (machine.home / "out").iterdir()}
    assert set(repository.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "export.json"}


def test_a_token_that_may_not_write_is_refused_before_a_model_is_loaded(hub: Hub, machine: Machine, finished: TinyRun) -> None:
    done = machine.run("-c", CHECK, "export", str(finished.path), "--to", f"hub:{MINE}", who="reader")
    assert done.returncode == 4
    assert "loading" not in done.stdout
    assert not hub.repositories
    assert not (finished.path / "export").exists()


def test_merged_weights_are_uploaded_to_a_public_repository_where_asked(hub: Hub, machine: Machine, finished: TinyRun) -> None:
    words = ["export", str(finished.path), "--to", f"hub:{ORG}", "--merged", "--public", "--output", str(machine.home / "out")]
    done = machine.run("-c", CHECK, *words, who="writer")
    assert done.returncode == 0, done.stderr
    assert not hub.repositories[ORG].private
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(hub.repositories[ORG].files)


FROM_PYTHON = "import sys; from gemma_grpo import GRPOTrainer; print(GRPOTrainer.from_run(sys.argv[1]).push_to_hub(sys.argv[2]))"


def test_a_finished_run_is_uploaded_from_python(hub: Hub, machine: Machine, finished: TinyRun) -> None:
    done = machine.run("-c", FROM_PYTHON, str(finished.path), MINE, who="writer")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/{MINE}"
    assert hub.repositories[MINE].private
    assert hub.repositories[MINE].files == {path.name: path.read_bytes() for path in (finished.path / "adapter").iterdir()}
    refused = machine.run("-c", FROM_PYTHON, str(finished.path), ORG, who="reader")
    assert refused.returncode == 1
    assert "may not write" in refused.stderr
    assert ORG not in hub.repositories
