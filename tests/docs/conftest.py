"""A folder in which every line of the docs finds what it names: runs/NAME, runs/ONE, runs/OTHER, RUN, mine.yaml, mine.py, rows."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from gemma_grpo.cli import run

QUICK = {
    **{"max_steps": 2, "batch_size": 4, "num_generations": 4, "witness.num_prompts": 4, "witness.look_alikes": 2},
    **{"reward_model.max_pairs": 64, "evaluation.num_prompts": 4, "evaluation.num_completions": 1, "save_steps": 1},
    "data.holdout": 0.01,
}
"""Of the run that the docs' placeholders stand for: what it learned is nothing, what it wrote is all there is."""

MINE = """def mine(completions, **columns):
    return [float(len(one[0]["content"])) for one in completions]
"""


def pair(index: int) -> dict[str, str]:
    """One row as hh-rlhf has them."""
    talk = f"\n\nHuman: question {index}?\n\nAssistant: "
    return {"chosen": f"{talk}yes {index}", "rejected": f"{talk}no, number {index} is not it"}


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once for all processes of a test session; copy it before anything is run in it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # each process has a folder of its own in the session's
    folder = shared / "docs-folder"
    with FileLock(shared / "docs-folder.lock"):
        if not (folder / "ready").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _furnish(folder)
            (folder / "ready").touch()
    return folder


def _furnish(folder: Path) -> None:
    settings = [f"{key}={value}" for key, value in QUICK.items()]
    assert run(["train", "miniature", *settings, f"output_dir={folder / 'runs' / 'NAME'}"]) == 0
    for name in ("ONE", "OTHER"):
        shutil.copytree(folder / "runs" / "NAME", folder / "runs" / name)
    (folder / "RUN").symlink_to(Path("runs") / "NAME")
    with gzip.open(folder / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(pair(index)) + "\n" for index in range(24)))
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    (folder / "mine.yaml").write_text("model_name: miniature\ndataset: miniature\nreward: {mine: 1.0}\n", encoding="utf-8")


@pytest.fixture
def folder(furnished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(furnished, tmp_path / "folder", symlinks=True))
