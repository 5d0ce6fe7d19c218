"""The templates for several machines: well formed, and what they start is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from gemma_grpo.cli.app import app
from gemma_grpo.config import load_recipe

FOLDER = Path(__file__).resolve().parents[1] / "launch"
TEMPLATES = sorted(FOLDER.iterdir())


def test_there_are_templates() -> None:
    assert {path.name for path in TEMPLATES} == {"slurm.sh", "pytorchjob.yaml", "skypilot.yaml"}


def test_the_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)
    text = (FOLDER / "slurm.sh").read_text(encoding="utf-8")
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    first = next(number for number, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert all(text.splitlines().index(line) < first for line in options)  # Slurm reads none after the first command
    assert "--requeue" in text
    assert "TERM" in text


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "skypilot.yaml"])
def test_the_documents_are_yaml(name: str) -> None:
    assert isinstance(yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_what_is_started_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(r"-m,? gemma_grpo,? train", text)
    assert "train" in get_command(app).commands  # type: ignore[attr-defined]
    assert "output_dir=" in text  # a run that starts again must know where it was


def test_the_recipe_that_is_named_is_shipped() -> None:
    assert load_recipe(yaml.safe_load((FOLDER / "skypilot.yaml").read_text(encoding="utf-8"))["envs"]["RECIPE"]).model_name
