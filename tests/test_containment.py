"""What the program names itself stays in runs/, and no link inside a run directory leads its writing or deleting outside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_grpo.config import GRPOConfig
from gemma_grpo.containment import link_out
from gemma_grpo.grpo.preflight import run_path
from gemma_grpo.monitor.events import RunDirectory, RunDirectoryError, next_run_path
from gemma_grpo.monitor.report import write_report

HOSTILE = [
    *("..", ".", "", "/", "//", "../..", "../../etc/passwd", "/etc/passwd", "~/.ssh/id_rsa", "~root"),
    *("..\\..\\windows", "C:\\", "C:/boot.ini", "\\\\server\\share", "CON", "NUL.txt", "con/..", "a/../../b", "..%2f..%2f", "%252e%252e/"),
    *("\uff0e\uff0e/\uff0e\uff0e", "\u2025/x", "\u2215etc\u2215passwd", "\u202egpj.exe", "\u200b", "\x00", "a\x00/../b", "-rf", "--help"),
    *("$(id)", "`id`", "a;rm -rf .", "a|b", "a\nb", "\r\n", "*", "?", "x" * 300, "." * 300, "\ud800/\U0001f4a9"),
]
SAFE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def test_the_table_has_forty_names() -> None:
    assert len(set(HOSTILE)) == 40


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_an_automatic_run_name_is_one_plain_name_within_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both = {"model_name": name, "dataset": name}
    for update in ({"model_name": name}, {"dataset": name}, both, None):
        path = next_run_path("runs", name) if update is None else run_path(GRPOConfig().model_copy(update=update))
        assert path.parent == Path("runs")
        assert SAFE.fullmatch(path.name)
        assert Path(os.path.realpath(path)).parent == tmp_path / "runs"
        path.mkdir(parents=True)  # a name that a file system takes
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_an_output_dir_is_the_users_own_choice(tmp_path: Path) -> None:
    assert run_path(GRPOConfig(output_dir=str(tmp_path / "anywhere"))) == tmp_path / "anywhere"


# ---- links inside a run directory

NAMES = [
    *("metrics.jsonl", "samples.jsonl", "witnesses.jsonl", "events.jsonl", "run.json", "recipe.yaml"),
    *("evaluation.json", "profile.json", "report.html"),
    *(".lock", ".writer", ".run.json.tmp", ".report.html.tmp", "checkpoints", "checkpoints/step-00000012", "checkpoints/.trash-x"),
    *("checkpoints/step-00000012/policy", "reward", "reward/calibration.json", "reward/adapter_model.safetensors", "adapter"),
    *("adapter/adapter_config.json", "adapter/adapter_other.bin", "best", "best/best.json", "witness", "witness/calibration.json"),
]
MADE_WITH_IT = ("metrics.jsonl", "samples.jsonl", "witnesses.jsonl", "events.jsonl")
# without a recipe.yaml that can be read it would be no run directory at all
CASES = [(name, target) for name in NAMES for target in ("outside", "file", "nowhere") if name != "recipe.yaml" or target == "file"]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """What is not the run's: a folder and a file, which must be as they are when the test is over."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "adapter_old.safetensors").write_text("mine", encoding="utf-8")
    (folder / ".trash-step").mkdir()
    (tmp_path / "file").write_text("seed: 0\n", encoding="utf-8")
    yield tmp_path
    assert (tmp_path / "file").read_text(encoding="utf-8") == "seed: 0\n"
    assert {path.name for path in folder.iterdir()} == {"adapter_old.safetensors", ".trash-step"}
    assert not (tmp_path / "nowhere").exists()


def new_run(path: Path) -> Path:
    RunDirectory.create(path, "seed: 0\n", {"status": "running"}).close()
    return path


@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_link_that_leads_out_is_refused_by_its_name_before_anything_is_written(outside: Path, name: str, target: str) -> None:
    run = new_run(outside / "run")
    link = run / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside / target)
    words = re.escape(f"{link} is a link to {outside / target}, outside the run directory")
    with pytest.raises(RunDirectoryError, match=words):
        RunDirectory.open(run)
    with pytest.raises(ValueError, match=words):
        write_report(run)
    if name not in ("recipe.yaml", "run.json", *MADE_WITH_IT):  # those say that a run is there
        for file in run.iterdir():
            if not file.is_symlink() and file.is_file():
                file.unlink()
        with pytest.raises(RunDirectoryError, match=words):
            new_run(run)


def test_a_link_by_relative_steps_or_through_another_link_is_seen(outside: Path) -> None:
    run = new_run(outside / "run")
    (run / "adapter").symlink_to("../outside")
    assert f"{run / 'adapter'} is a link to {outside / 'outside'}" in str(link_out(run))
    (run / "adapter").unlink()
    (outside / "twin").symlink_to(run)  # leads back in, by way of outside
    (run / "adapter").symlink_to("../twin")
    assert link_out(run) is None
    (outside / "run-2").mkdir()  # a name that begins alike is not inside
    (run / "reward").symlink_to(outside / "run-2")
    assert "outside the run directory" in str(link_out(run))


def test_links_that_stay_inside_and_a_run_directory_that_is_a_link_are_fine(tmp_path: Path) -> None:
    run = new_run(tmp_path / "disk" / "run")
    (run / "checkpoints").mkdir()
    (run / "latest").symlink_to("checkpoints")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "mine").symlink_to(run)
    for path in (tmp_path / "runs" / "run", tmp_path / "mine"):
        with RunDirectory.open(path) as opened:
            opened.event("note", text="written")
    assert (run / "events.jsonl").read_text(encoding="utf-8").count("written") == 2


def test_a_run_that_goes_on_does_not_delete_what_its_checkpoints_are_linked_to(train_tiny, outside: Path) -> None:
    run = train_tiny(output_dir=str(outside / "trained"), max_steps=1, save_steps=1)
    elsewhere = outside / "copied"
    (run.path / "checkpoints").rename(elsewhere)
    (elsewhere / ".trash-of-somebody").mkdir()
    (run.path / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(RunDirectoryError, match="checkpoints is a link to"):
        train_tiny(output_dir=str(run.path), max_steps=2, save_steps=1, resume=True)
    assert {path.name for path in elsewhere.iterdir()} == {".trash-of-somebody", "step-00000001"}
