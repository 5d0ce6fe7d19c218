"""A folder in which every line of the docs finds what it names: runs/NAME, runs/ONE, runs/OTHER, RUN, mine.yaml, mine.py, rows.

The runs are of a random Gemma 3 of two layers: what they learned is nothing, what they wrote is all there is.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from markdown_blocks import SMALL

from gemma_grpo.cli import run

MINE = """def mine(completions, **columns):
    return [float(len(one[0]["content"])) for one in completions]
"""


def pair(index: int) -> dict[str, str]:
    """One row as hh-rlhf has them."""
    talk = f"\n\nHuman: question {index}?\n\nAssistant: "
    return {"chosen": f"{talk}yes {index}", "rejected": f"{talk}no, number {index} is not it"}


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory, small_model_dir: Path) -> Path:
    """Made once for all processes of a test session; copy it before anything is run in it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # each process has a folder of its own in the session's
    folder = shared / "docs-folder"
    with FileLock(shared / "docs-folder.lock"):
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copytree(small_model_dir, folder / "small-gemma")
            _furnish(folder)
            (folder / "ready").touch()
    return folder


def _furnish(folder: Path) -> None:
    with gzip.open(folder / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(pair(index)) + "\n" for index in range(24)))
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table)
        writer.writerows([("prompt", "chosen", "rejected"), *((f"question {n}?", f"yes {n}", f"no, {n} is not it") for n in range(24))])
    settings = {**SMALL, "max_steps": "2", "model_name": str(folder / "small-gemma"), "dataset": str(folder / "rows.jsonl.gz")}
    words = [f"{key}={value}" for key, value in settings.items()]
    assert run(["train", "miniature", *words, f"output_dir={folder / 'runs' / 'NAME'}"]) == 0
    for name in ("ONE", "OTHER"):
        shutil.copytree(folder / "runs" / "NAME", folder / "runs" / name)
    (folder / "RUN").symlink_to(Path("runs") / "NAME")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    (folder / "mine.yaml").write_text("model_name: miniature\ndataset: miniature\nreward: {mine: 1.0}\n", encoding="utf-8")


@pytest.fixture
def folder(furnished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(furnished, tmp_path / "folder", symlinks=True))
