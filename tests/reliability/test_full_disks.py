"""A disk that is full at any file of a run: the file is named, nothing is half written, and with room again the run ends as ever."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma_grpo.checkpoint import CheckpointError
from gemma_grpo.monitor.durable import RunDirectoryError
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.run_files import read_run_files
from reliability.trainer_kills import content

SETTINGS = {"max_steps": 4, "epochs": 2, "save_steps": 2, "planning_steps": 2, "evaluation.num_prompts": 3}


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets the size that no file may exceed from now on, as a disk that is full would; taken back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def some_reward(completion_ids, **columns):
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


class FillingAt:
    """The same reward, and at its call with this number something else happens first."""

    __name__ = "some_reward"

    def __init__(self, call: int, happens: Callable[[], None]) -> None:
        self.left, self.happens = call, happens

    def __call__(self, completion_ids, **columns):
        self.left -= 1
        if self.left == 0:
            self.happens()
        return some_reward(completion_ids)


@pytest.fixture(scope="module")
def whole(train_tiny) -> dict[str, bytes]:
    return content(train_tiny(reward=some_reward, **SETTINGS).path)


@pytest.fixture
def fails(tiny_trainer, train_tiny, tmp_path: Path, largest_file, whole) -> Callable[..., None]:
    """Trains until the disk is full at a call of the reward, checks what is left, makes room and goes on to the undisturbed end."""

    def check(call: int, size: Callable[[Path], int], error: type[Exception], message: str, gone: tuple[str, ...]) -> None:
        run = tmp_path / "run"
        filling = FillingAt(call, lambda: largest_file(size(run)))
        with pytest.raises(error, match=message):
            tiny_trainer(reward=filling, output_dir=str(run), **SETTINGS).train()
        shown = read_run_files(run)  # while it is still full
        assert [problem for problem in shown.problems if "damaged" in problem] == []
        assert [log.name for log in run.glob("*.jsonl") if log.read_bytes()[-1:] not in (b"", b"\n")] == []
        largest_file(resource.RLIM_INFINITY)
        left = {path.relative_to(run).as_posix() for path in run.rglob("*")}
        assert not [name for name in left if ".tmp" in name or name in gone]
        RunDirectory.open(run).close()  # nobody holds it
        train_tiny(resume=True, reward=some_reward, output_dir=str(run), **SETTINGS)
        assert content(run) == whole

    return check


def of(name: str, more: int) -> Callable[[Path], int]:
    return lambda run: (run / name).stat().st_size + more


FULL = "the file would exceed the size limit"
CASES = {
    # the 4th call is step 4's, the 5th and 6th are the evaluation's
    "the metrics": (4, of("metrics.jsonl", 100), RunDirectoryError, rf"metrics\.jsonl was not written: {FULL}", ("adapter",)),
    "the samples": (4, of("samples.jsonl", 100), RunDirectoryError, rf"samples\.jsonl was not written: {FULL}", ("adapter",)),
    "the checkpoint": (4, lambda run: 8_000, CheckpointError, r"checkpoint step 4 not written .*; step 2 is intact", ("adapter",)),
    "everything": (4, lambda run: 0, RunDirectoryError, rf"metrics\.jsonl was not written: {FULL}", ("adapter",)),
    "the evaluation": (6, lambda run: 1_000, RunDirectoryError, rf"evaluation\.json was not written: {FULL}", ("evaluation.json",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_named_and_once_there_is_room_the_run_ends_as_ever(fails, name: str) -> None:
    fails(*CASES[name])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two pages."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_has_no_room_for_the_final_adapter(tiny_trainer, train_tiny, tmp_path: Path, small_disk: Path, whole) -> None:
    run = tmp_path / "run"
    filling = FillingAt(4, lambda: (run / "adapter").symlink_to(small_disk))
    with pytest.raises(CheckpointError, match=r"adapter was not written \(.*No space left on device.*what was written before is intact"):
        tiny_trainer(reward=filling, output_dir=str(run), **SETTINGS).train()
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert [path.name for path in small_disk.iterdir() if path.name != "adapter_config.json"] == []
    (run / "adapter").unlink()
    train_tiny(resume=True, reward=some_reward, output_dir=str(run), **SETTINGS)
    assert content(run) == whole


def test_an_outcome_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path: Path, largest_file) -> None:
    with RunDirectory.create(tmp_path / "run", "seed: 0\n", {"status": "running"}) as run:
        largest_file(4)
        run.ended(3, KeyError("the reason"))
        with pytest.raises(RunDirectoryError, match=FULL):
            run.ended(3)
        largest_file(resource.RLIM_INFINITY)
        assert run.read_run() == {"status": "running"}
        run.ended(3, KeyError("the reason"))
        assert run.read_run()["error"] == "KeyError: 'the reason'"
