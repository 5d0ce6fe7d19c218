"""A folder that a run cannot be written to is refused before the model is loaded, and nothing is left there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_grpo import GRPOTrainer
from gemma_grpo.config import dump_recipe
from gemma_grpo.monitor.durable import RunDirectoryError
from gemma_grpo.monitor.events import RunDirectory

ROWS = [{"prompt": f"question {index}?"} for index in range(16)]
AS_ROOT = os.geteuid() == 0


def trainer_at(output_dir: Path | str) -> GRPOTrainer:
    """One whose model cannot be loaded: what is refused with it was refused before."""
    return GRPOTrainer(model_name="/nowhere/no-model", dataset=ROWS, reward="length", output_dir=str(output_dir))


def begin(output_dir: Path | str, *, resume: bool = False) -> None:
    trainer_at(output_dir).train(resume_from_checkpoint=resume)


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def deep(folder: Path, length: int) -> Path:
    """A path of so many characters below a folder, each name short enough."""
    room = length - len(str(folder)) - 1
    names = ["d" * 100] * (room // 101)
    return folder.joinpath(*names, "e" * max(1, room - 101 * len(names)))


REFUSED = {
    "a name of 300 letters": (lambda folder: folder / ("x" * 300), "the name is too long for the file system"),
    "a name of 256 bytes": (lambda folder: folder / ("é" * 128), "the name is too long for the file system"),
    "a long name in a folder that is missing too": (lambda folder: folder / "no" / ("x" * 256), "the name is too long"),
    "a path that leaves a run no room": (lambda folder: deep(folder, 4060), "the name is too long for the file system"),
    "a NUL": (lambda folder: f"{folder}/a\0b", "contains a NUL character"),
    "a name that is no UTF-8": (lambda folder: os.fsdecode(bytes(folder) + b"/run-\xff"), r"run-\\udcff' cannot hold a run"),
    "a broken link": (lambda folder: linked(folder, folder / "nowhere"), "is a link that leads nowhere"),
    "below a broken link": (lambda folder: linked(folder, folder / "nowhere") / "run", "is a link that leads nowhere"),
    "a link to itself": (lambda folder: linked(folder, folder / "link"), "its links lead round in a circle"),
    "where no folder can be made": (lambda folder: Path("/proc/self/run"), r"was not written: .*(folder|output_dir)"),
}


def linked(folder: Path, target: Path) -> Path:
    (folder / "link").symlink_to(target)
    return folder / "link"


@pytest.mark.parametrize("name", REFUSED)
def test_a_place_for_no_run_is_refused_before_the_model_is_loaded(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    path = make(tmp_path)
    before = everything_in(tmp_path)
    with pytest.raises(RunDirectoryError, match=message):
        begin(path)
    assert everything_in(tmp_path) == before


def test_a_path_with_just_enough_room_and_missing_parents_is_taken(tmp_path: Path) -> None:
    # 4096 with the NUL at its end, less the longest path of a run
    path = deep(tmp_path, 4096 - 1 - len("/checkpoints/.tmp-step-0000000012/policy/adapter_model.safetensors"))
    with pytest.raises(ValueError, match="no such folder"):
        begin(path)  # it is the model that is missing
    assert everything_in(tmp_path) == []
    with RunDirectory.create(path, "", {}) as run:
        (run.checkpoints / ".tmp-step-0000000012" / "policy").mkdir(parents=True)
        (run.checkpoints / ".tmp-step-0000000012" / "policy" / "adapter_model.safetensors").touch()
    shutil.rmtree(next(tmp_path.iterdir()))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds a run and is read-only, even for root."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if not AS_ROOT or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        RunDirectory.create(folder / "run", dump_recipe(trainer_at(folder / "run").config), {}).close()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_file_system_is_refused_before_the_model_is_loaded(read_only: Path) -> None:
    for path in (read_only / "new", read_only / "deep" / "new", read_only):
        with pytest.raises(RunDirectoryError, match=r"was not written: the file system is read-only\. Choose an output_dir on another one"):
            begin(path)


def test_a_run_on_a_read_only_file_system_does_not_go_on(read_only: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"\.lock was not written: the file system is read-only"):
        begin(read_only / "run", resume=True)


WITHOUT_RIGHTS = """
    import os, sys
    from gemma_grpo.monitor.events import RunDirectory, RunDirectoryError
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    for name in ("run", "deep/run", "."):
        try:
            RunDirectory.check(os.path.join(sys.argv[1], name))
        except RunDirectoryError as error:
            print(error)
"""


def test_a_folder_without_the_right_to_write_is_refused() -> None:
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folders are closed to others
        folder = Path(temporary)
        folder.chmod(0o555)
        command = [sys.executable, "-c", textwrap.dedent(WITHOUT_RIGHTS), temporary]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        folder.chmod(0o755)
    said = "was not written: this user may not write there. Change the permissions, or choose another output_dir."
    assert [line.endswith(said) for line in result.stdout.splitlines()] == [True, True, True]
