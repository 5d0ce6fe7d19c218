"""The notebook for Colab: five cells that install nothing older, and that go on with a run after the session was killed.

They run in a real kernel, on a random Gemma of two layers; the one thing that is changed is RUN, as the notebook says.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_blocks import ROOT, SMALL

nbclient = pytest.importorskip("nbclient", reason="the dev extra is not installed: pip install 'gemma-grpo[dev]'")
pytest.importorskip("ipykernel", reason="the dev extra is not installed: pip install 'gemma-grpo[dev]'")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = ROOT / "notebooks" / "gemma_grpo_colab.ipynb"
STEPS = 24
RUN = re.compile(r"^RUN = (\{.*\})$", re.MULTILINE)
PATIENCE = 300.0


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_it_has_five_cells_without_outputs_and_is_valid() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert len(code(notebook)) == 5
    assert [source.split(".")[0] for source in code(notebook)] == [f"# {number}" for number in range(1, 6)]
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]


def test_nothing_is_pinned_forced_or_downgraded() -> None:
    installs = [line for source in code(read()) for line in source.splitlines() if "pip" in line and not line.startswith("#")]
    assert installs == ["%pip install --quiet $PACKAGE"]


def test_no_token_is_in_it() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "HF_TOKEN" in text
    assert not re.search(r"hf_[A-Za-z0-9]{8,}|login\(|getpass|input\(", text)


def test_its_settings_are_settings() -> None:
    from gemma_grpo.config import load_recipe

    run = ast.literal_eval(RUN.findall("\n".join(code(read())))[0])
    config = load_recipe(run.pop("recipe"), {name: value for name, value in run.items() if name != "name"})
    assert (config.model_name, config.max_steps) == ("google/gemma-3-4b-it", 200)


def on_a_small_gemma() -> Any:
    """The notebook with another RUN, and nothing else changed."""
    notebook = read()
    small = {key: yaml.safe_load(value) for key, value in SMALL.items()}
    run = {**small, "recipe": "gemma3-4b-t4", "name": "first", "max_steps": STEPS, "epochs": 9, "save_steps": 1}
    replaced = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, count = RUN.subn(lambda _: f"RUN = {run!r}", cell.source)
            replaced += count
    assert replaced == 1
    return notebook


def client(folder: Path) -> Any:
    return nbclient.NotebookClient(on_a_small_gemma(), timeout=PATIENCE, resources={"metadata": {"path": str(folder)}})


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def killed_in_the_middle(folder: Path) -> None:
    """Run the cells and kill the kernel, as a session that is taken away is, once two steps are made and saved."""
    running, run = client(folder), folder / "runs" / "first"
    ended, killed = threading.Event(), threading.Event()

    def kill() -> None:
        while not ended.wait(0.005):
            if any(run.glob("checkpoints/step-0000000[2-9]")):
                os.kill(running.km.provisioner.process.pid, signal.SIGKILL)
                killed.set()
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with suppress(Exception):  # what nbclient makes of a dead kernel depends on when it notices
            running.execute()
    finally:
        ended.set()
        killer.join()
    assert killed.is_set(), outputs(running.nb)


def outputs(notebook: Any) -> str:
    """All that the cells printed or showed, as text."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            found.append(output.get("text") or "".join(output.get("data", {}).values()))
    return "\n".join(found)


@pytest.mark.slow
def test_a_session_that_is_killed_is_gone_on_with_by_running_the_cells_again(
    furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    for name in ("small-gemma", "rows.jsonl.gz"):
        (tmp_path / name).symlink_to(furnished / name)
    run = tmp_path / "runs" / "first"
    killed_in_the_middle(tmp_path)
    made = steps(run)
    assert 2 <= len(made) < STEPS
    assert not (run / "evaluation.json").exists()

    again = client(tmp_path)
    started = time.monotonic()
    again.execute()
    assert time.monotonic() - started < PATIENCE
    assert steps(run) == list(range(1, STEPS + 1))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["resume"] for event in events if event["kind"] == "start"] == [False, True]
    shown = outputs(again.nb)
    assert "torch and numpy are as they were" in shown
    assert "fits: about" in shown
    assert "<iframe srcdoc=" in shown
    assert "base> " in shown
    assert "reward of tuned:" in shown
    assert "Traceback" not in shown
