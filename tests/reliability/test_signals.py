"""A signal at any moment: a code that tells, no trace, no finished step lost, and the run that goes on equals the undisturbed one."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Process, forked, started, steps_saved

from gemma_grpo.checkpoint import latest_checkpoint
from gemma_grpo.monitor.events import RunDirectory
from reliability.trainer_kills import content

SECONDS = 30
"""From the signal to the end of the process at most, on a machine that has other work beside."""
SETTINGS = (
    *("batch_size=2", "gradient_accumulation_steps=1", "num_generations=2", "planning_steps=2", "max_completion_length=6"),
    *("max_prompt_length=200", "max_steps=4", "epochs=9", "save_steps=2", "gradient_checkpointing=false", "precision=fp32"),
    *("reward_model.batch_size=4", "reward_model.max_pairs=16", "evaluation.num_prompts=3", "data.holdout=0.3", "kl.step_limit=null"),
)


@pytest.fixture(scope="module")
def command(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """The command line of a run in a folder: reward training, four steps, evaluation."""
    rows = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    asked = [f"\n\nHuman: Say {n}\n\nAssistant:" for n in range(24)]
    rows.write_text("".join(json.dumps({"chosen": f"{text} ok", "rejected": f"{text} no no"}) + "\n" for text in asked), encoding="utf-8")
    return lambda run: ["train", "miniature", f"model_name={small_model_dir}", f"dataset={rows}", f"output_dir={run}", *SETTINGS]


@pytest.fixture(scope="module")
def whole(command: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """Every file of the undisturbed run, and how many seconds it takes."""
    folder = tmp_path_factory.mktemp("whole")
    process = forked(command(folder / "run"), folder)
    seconds = process.end()
    assert process.code == 0, process.err
    return content(folder / "run"), seconds


def no_trace(process: Process) -> None:
    for sign in ("Traceback", "Exception ignored", "Error:"):
        assert sign not in process.err, process.err


def assert_goes_on(command: Callable[[Path], list[str]], run: Path, whole: tuple[dict[str, bytes], float]) -> None:
    """Started again, the run ends well and equals the undisturbed one."""
    process = forked(command(run), run.parent)
    process.end()
    assert process.code == 0, process.err
    found, expected = content(run), whole[0]
    assert [name for name in sorted({**found, **expected}) if found.get(name) != expected.get(name)] == []


def stopped_well(process: Process, run: Path, name: str) -> float:
    """The first signal has been sent; seconds that the end took."""
    seconds = process.end()
    assert process.code == 75, f"{process.code}\n{process.err}"
    assert seconds < SECONDS
    no_trace(process)
    assert "error: stopped." in process.err
    if (run / "run.json").exists():
        info = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if info["status"] != "finished":  # and only the report was missing
            assert (info["status"], info["error"]) == ("stopped", f"stopped by {name}")
            assert f"train {run / 'recipe.yaml'} --resume goes on with this run" in process.out
        steps_saved(run)
        RunDirectory.open(run).close()  # the lock is free
    return seconds


def printed(text: str) -> Callable[[Process, Path], bool]:
    return lambda process, run: text in process.out


def saving(process: Process, run: Path) -> bool:
    return any(path.name.startswith(".tmp-") for path in (run / "checkpoints").glob(".*"))


MOMENTS: dict[str, Callable[[Process, Path], bool]] = {
    "loading": printed("\nloading: "),
    "reward training": printed("\nreward adapter 1/"),
    "a step": printed("\nstep 3/"),
    "saving": saving,
    "evaluation": printed("\nevaluation: "),
}


@pytest.mark.parametrize("moment", [name if name == "saving" else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS])
def test_a_termination_ends_with_75_and_the_run_goes_on_as_if_there_had_been_none(command, whole, tmp_path: Path, moment: str) -> None:
    run = tmp_path / "run"
    begin = started if moment == "a step" else forked  # which spares 6 seconds of imports
    process = begin(command(run), tmp_path)
    assert process.wait_until(lambda: MOMENTS[moment](process, run)), process.err
    process.signal(signal.SIGTERM)
    print(f"{moment}: {stopped_well(process, run, 'SIGTERM'):.2f} s")
    if moment != "loading":  # which may be left at once
        assert "SIGTERM: stopping after this piece of work; once more ends at once." in process.err
    assert_goes_on(command, run, whole)


def stopped_and_gone_on(command, whole, folder: Path, number: int, seconds: float) -> tuple[str, float]:
    """A run that gets a signal after so many seconds, and goes on: what it was at, and how long the end took."""
    folder.mkdir()
    run = folder / "run"
    process = forked(command(run), folder)
    deadline = time.monotonic() + seconds
    process.wait_until(lambda: time.monotonic() > deadline)
    lines = process.out.splitlines()
    at = lines[-1].split(" ")[0].rstrip(":") if lines else "start"
    if process.code is not None:
        assert process.code == 0, process.err
        return "finished before", 0.0
    process.signal(number)
    took = process.end()
    if process.code == 0:  # it came when the last thing was done
        assert content(run) == whole[0]
        return "finished before", took
    stopped_well(process, run, signal.Signals(number).name)
    assert took < SECONDS
    assert_goes_on(command, run, whole)
    shutil.rmtree(folder)
    return at, took


@pytest.mark.slow
def test_fifty_terminations_at_random_moments_lose_nothing(command, whole, tmp_path: Path) -> None:
    generator, moments, took = random.Random(0), Counter[str](), []
    while sum(moments.values()) < 50:
        at, seconds = stopped_and_gone_on(command, whole, tmp_path / f"{len(took)}", signal.SIGTERM, generator.uniform(0, 1.1 * whole[1]))
        took.append(seconds)
        if at != "finished before":
            moments[at] += 1
    print(f"{dict(moments)}: {min(took):.2f} to {max(took):.2f} s")
    assert {"step", "evaluation"} <= set(moments)  # loading takes a moment that chance may miss; it has its own test above
    assert {"reward", "witness"} & set(moments)  # after an update of either judge's training


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_still_importing_ends_at_once_without_a_trace(command, tmp_path: Path, number: signal.Signals) -> None:
    generator = random.Random(number)
    for _ in range(4):
        process = started(command(tmp_path / "run"), tmp_path)
        assert process.wait_until(lambda: "completions per update" in process.out)  # noqa: B023
        time.sleep(generator.uniform(0, 3))
        process.signal(number)
        assert process.end() < SECONDS
        assert process.code == 75
        no_trace(process)
        assert not (tmp_path / "run").exists()


def at_step(command, folder: Path, **options) -> tuple[Process, Path]:
    """A forked run that has saved its second step."""
    run = folder / "run"
    process = forked(command(run), folder, **options)
    assert process.wait_until((run / "checkpoints" / "step-00000002").is_dir), process.err
    return process, run


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_an_interrupt_and_a_hangup_are_requests_as_a_termination_is(command, whole, tmp_path: Path, number: signal.Signals) -> None:
    process, run = at_step(command, tmp_path)
    process.signal(number)
    stopped_well(process, run, number.name)
    assert_goes_on(command, run, whole)


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_further_interrupts_end_it_at_once_and_leave_a_whole_checkpoint(command, whole, tmp_path: Path, times: int) -> None:
    process, run = at_step(command, tmp_path)
    for _ in range(times):
        process.signal(signal.SIGINT)
        time.sleep(0.002)  # two at once are one to the system
    assert process.end() < SECONDS
    assert process.code == 75
    no_trace(process)
    found, damaged = latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert (found.step, damaged) in [(2, []), (3, []), (4, [])]
    assert_goes_on(command, run, whole)


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(command, whole, tmp_path: Path) -> None:
    process, run = at_step(command, tmp_path, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.signal(signal.SIGHUP)
    process.end()
    assert process.code == 0, process.err
    assert content(run) == whole[0]


def test_a_terminal_that_goes_away_stops_the_run_and_it_can_go_on(command, whole, tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()

    def of_its_own() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(its_end), os.O_RDWR))  # the first terminal that is opened is the one that hangs up
        os.close(terminal)

    process, run = at_step(command, tmp_path, prints={1: its_end, 2: its_end}, before=of_its_own)
    os.close(its_end)
    os.close(terminal)
    assert process.end() < SECONDS
    assert process.code == 75
    assert steps_saved(run) >= 2
    assert_goes_on(command, run, whole)


@pytest.mark.slow
def test_a_reader_that_went_away_does_not_end_the_run(command, whole, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    process = forked(command(tmp_path / "run"), tmp_path, prints={1: writing}, before=lambda: os.close(reading))
    os.close(writing)
    assert os.read(reading, 1) != b""
    os.close(reading)
    process.end()
    assert process.code == 1  # the run is finished; what was to be printed was not
    assert process.err == ""
    assert content(tmp_path / "run") == whole[0]
