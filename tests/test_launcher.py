"""`gpus=2` on the command line: several processes from one command, and what a user sees when they end early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PAIR_ROWS

from reliability.rank_kills import alive, left_over, ranks_of

RECIPE = """
model_name: {model}
dataset: {rows}
reward: {{length: 1.0}}
batch_size: 2
gradient_accumulation_steps: 2
num_generations: 3
max_completion_length: 10
epochs: 100
save_steps: 3
gradient_checkpointing: false
data: {{holdout: 0.25}}
witness: {{every: 0, look_alikes: 0, share: 0.0}}
evaluation: {{num_prompts: 0}}
advantage: {{no_signal_steps: 0}}
"""
LOGS = ("metrics.jsonl", "samples.jsonl")


class Lab:
    """A recipe on the small model, and commands in its folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in PAIR_ROWS), encoding="utf-8")
        (folder / "recipe.yaml").write_text(RECIPE.format(model=model, rows=rows), encoding="utf-8")

    def start(self, run: str, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gemma_grpo.cli", "train", "recipe.yaml", f"output_dir={self.folder / run}", *words]
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Exit code, output, errors; nobody may be left behind."""
        out, err = process.communicate(timeout=240)
        deadline = time.monotonic() + 10
        while left_over(self.folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left_over(self.folder)
        return process.returncode, out, err

    def logs(self, run: str) -> list[bytes]:
        return [(self.folder / run / name).read_bytes() for name in LOGS]

    def after_steps(self, run: str, count: int, process: subprocess.Popen[str]) -> None:
        log = self.folder / run / "metrics.jsonl"
        while not log.is_file() or log.read_bytes().count(b"\n") < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def lab(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), small_model_dir)


@pytest.fixture(scope="module")
def whole(lab: Lab) -> list[bytes]:
    """The logs of an undisturbed run of twelve steps on two ranks."""
    code, out, err = lab.end(lab.start("whole", "gpus=2", "max_steps=12"))
    assert code == 0, err
    assert out.count("step 12/12") == 1  # rank 0 alone speaks
    assert (lab.folder / "whole" / "report.html").is_file()
    assert "gpus: 2" in (lab.folder / "whole" / "recipe.yaml").read_text(encoding="utf-8")
    return lab.logs("whole")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["the command", "a rank"])
def test_a_stop_saves_once_and_the_same_command_goes_on(lab: Lab, whole: list[bytes], who: str) -> None:
    run = f"stopped-{who.replace(' ', '-')}"
    process = lab.start(run, "gpus=2", "max_steps=12")
    lab.after_steps(run, 4, process)
    os.kill(process.pid if who == "the command" else ranks_of(process.pid)[1], signal.SIGTERM)
    code, _, err = lab.end(process)
    assert code == 75, err
    assert err.count("error: stopped.") == 1
    assert json.loads((lab.folder / run / "run.json").read_text(encoding="utf-8"))["status"] == "stopped"
    code, _, err = lab.end(lab.start(run, "gpus=2", "max_steps=12"))
    assert code == 0, err
    assert lab.logs(run) == whole


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_after_a_kill_all_start_again_and_the_run_is_the_same(lab: Lab, whole: list[bytes], number: int) -> None:
    run = f"killed-{number}"
    process = lab.start(run, "gpus=2", "max_steps=12", "ranks.max_restarts=1")
    lab.after_steps(run, 4, process)
    ranks = ranks_of(process.pid)
    os.kill(ranks[number], signal.SIGKILL)
    began = time.monotonic()
    while alive(ranks[1 - number]):
        assert time.monotonic() - began < 15
        time.sleep(0.05)
    code, _, err = lab.end(process)
    assert code == 0, err
    assert lab.logs(run) == whole


BROKEN = """
import os

calls = []

def broken(completions, **columns):
    calls.append(len(completions))
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise KeyError("no price for number seven")
    return [float(len(completion)) for completion in completions]
"""


def test_an_error_of_one_rank_is_said_once_and_by_name(lab: Lab) -> None:
    (lab.folder / "mine.py").write_text(BROKEN, encoding="utf-8")
    words = ("gpus=2", "max_steps=12", "--allow-code", "mine.py", "reward.length=0", "reward.broken=1.0")
    code, out, err = lab.end(lab.start("broken", *words))
    assert code == 1, (out, err)
    assert "no price for number seven" in err
    assert err.count("error:") <= 2  # the rank's own, and rank 0's that names it
    info = json.loads((lab.folder / "broken" / "run.json").read_text(encoding="utf-8"))
    assert (info["status"], "rank 1 failed" in info["error"], "no price for number seven" in info["error"]) == ("failed", True, True)
    assert [line.count(b"\n") for line in lab.logs("broken")[:1]] == [2]  # nothing of the third step was learned


@pytest.mark.slow
def test_more_ranks_than_prompts_are_refused(lab: Lab) -> None:
    code, _, err = lab.end(lab.start("many", "gpus=3", "gradient_accumulation_steps=1"))
    assert code == 2
    assert "a step has 2 prompts" in err
    assert not (lab.folder / "many" / "metrics.jsonl").exists()


def test_the_doctor_asks_the_ranks(lab: Lab) -> None:
    words = [sys.executable, "-m", "gemma_grpo.cli", "doctor", "--gpus"]
    done = subprocess.run([*words, "2"], cwd=lab.folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["ok"] * 4  # two ranks, their sum, their folder
    assert "rank 1: " in said[1]
    assert "added up in" in said[2]
    assert str(lab.folder) in said[3]
    assert not list(lab.folder.glob(".gemma-grpo-*"))
    refused = subprocess.run([*words, "no"], cwd=lab.folder, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, "Give a number" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_the_reward_alone_is_trained_by_ranks_too(lab: Lab) -> None:
    settings = ["reward_model.max_pairs=8", "reward_model.batch_size=4", "gpus=2", f"output_dir={lab.folder / 'judge'}"]
    command = [sys.executable, "-m", "gemma_grpo.cli", "train-reward", "recipe.yaml", *settings]
    process = subprocess.Popen(command, cwd=lab.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    code, out, err = lab.end(process)
    assert code == 0, err
    assert out.count(f"reward adapter: {lab.folder / 'judge' / 'reward'}") == 1
    assert (lab.folder / "judge" / "reward" / "calibration.json").is_file()
