"""Laws of the run directory: one writer, whole lines, strict JSON, refusals that leave nothing behind."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import MappingProxyType

import pytest
from filelock import FileLock

from gemma_grpo.monitor.events import RunDirectory, RunDirectoryError, next_run_path
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord


def new_run(path: Path) -> RunDirectory:
    return RunDirectory.create(path, "seed: 0\n", {"status": "running"})


def scored_group(text: str) -> ScoredGroup:
    prompt = Prompt("p1", "harmless-base", ({"role": "user", "content": "Hi"},), (2, 7), "c1")
    completions = (Completion(text, (5, 106), (-0.1, -0.2), "stop"), Completion("", (5,), (-0.1,), "length"))
    return ScoredGroup(RolloutGroup(prompt, completions, 3), (1.0, None), {"length": (2.0, None)}, (0.5, 0.0))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_run_has_its_recipe_its_info_and_empty_logs(tmp_path: Path) -> None:
    with new_run(tmp_path / "deep" / "run") as run:
        assert run.recipe.read_text() == "seed: 0\n"
        assert run.read_run() == {"status": "running"}
        assert [(run.path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl")] == [b"", b"", b""]


def test_metrics_lines_hold_the_step_and_no_time(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_metrics(StepRecord(1, {"rollout": 3.2}, {"reward": 0.5}))
        run.append_metrics(StepRecord(2, {"rollout": 9.9}, {"reward": 0.75}))
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.75}\n'


def test_a_sample_line_keeps_every_completion_with_its_parts(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_samples(4, [scored_group("one\ntwo\u2028\ud800\x1b[2J")])
    (line,) = lines(tmp_path / "run/samples.jsonl")
    assert line == {
        "step": 4,
        "prompt_id": "p1",
        "source": "harmless-base",
        "prompt": [{"role": "user", "content": "Hi"}],
        "completions": [
            {
                "text": "one\ntwo\u2028\ud800\x1b[2J",
                "reward": 1.0,
                "parts": {"length": 2.0},
                "advantage": 0.5,
                "length": 2,
                "finish": "stop",
            },
            {"text": "", "reward": None, "parts": {"length": None}, "advantage": 0.0, "length": 1, "finish": "length"},
        ],
    }


def test_events_carry_kind_and_time(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.event("note", text="hello")
    (event,) = lines(tmp_path / "run/events.jsonl")
    assert (event["kind"], event["text"]) == ("note", "hello")
    assert isinstance(event["time"], float)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name_and_leaves_no_line(tmp_path: Path, value: float) -> None:
    with new_run(tmp_path / "run") as run:
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: kl is (nan|inf|-inf)"):
            run.append_metrics(StepRecord(1, {}, {"reward": 1.0, "kl": value}))
        with pytest.raises(RunDirectoryError, match=r"evaluation\.json: gold\.interval\[1\] is"):
            run.write_json("evaluation.json", {"gold": {"interval": [0.0, value]}})
        assert (run.path / "metrics.jsonl").read_bytes() == b""
        assert not (run.path / "evaluation.json").exists()


def test_foreign_types_and_keys_are_refused_by_name(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        with pytest.raises(RunDirectoryError, match=r"run\.json: model is a PosixPath"):
            run.update_run(model=Path("x"))
        with pytest.raises(RunDirectoryError, match="the key 3 is a int"):
            run.write_json("a.json", {"by_length": {3: 1}})


def test_read_only_mappings_are_written(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.write_json("reward/calibration.json", MappingProxyType({"by_source": MappingProxyType({"a": (1, 2)})}))
        assert json.loads((run.reward / "calibration.json").read_text()) == {"by_source": {"a": [1, 2]}}


def test_update_run_keeps_the_other_fields(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.update_run(steps=3)
        run.update_run(status="finished")
        assert run.read_run() == {"status": "finished", "steps": 3}


def test_a_file_in_the_way_is_refused_and_untouched(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    for path in (file, file / "inside"):
        with pytest.raises(RunDirectoryError, match=r"is a file.*Choose another output_dir"):
            new_run(path)
    assert file.read_text() == "mine"


def test_a_folder_with_another_run_is_refused_and_untouched(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunDirectoryError, match=r"already holds a run \(it contains recipe\.yaml\)"):
        RunDirectory.create(tmp_path / "run", "seed: 1\n", {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"MB free; the run needs about 1000000000000 MB"):
        RunDirectory.create(tmp_path / "a" / "run", "", {}, needed_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_creation_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"run\.json: loss is nan"):
        RunDirectory.create(tmp_path / "a" / "run", "", {"loss": math.nan})
    assert list(tmp_path.iterdir()) == []
    occupied = tmp_path / "occupied"
    (occupied / ".samples.jsonl.tmp").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=r"samples\.jsonl was not written: a folder stands where the file should go"):
        new_run(occupied)
    assert sorted(path.name for path in occupied.iterdir()) == [".lock", ".samples.jsonl.tmp"]


def test_opening_what_is_no_run_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"is not a run directory: it has no recipe\.yaml"):
        RunDirectory.open(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_cannot_share_a_run_and_the_error_names_the_holder(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    holder = f"process {os.getpid()} on host {socket.gethostname()}"
    assert (run.path / ".writer").read_text() == f"{holder}\n"
    with pytest.raises(RunDirectoryError, match=rf"is being written by {holder}\. Wait until that run ends or stop it, or choose"):
        RunDirectory.open(tmp_path / "run")
    other = """
        import sys, time
        from gemma_grpo.monitor.events import RunDirectory
        started = time.monotonic()
        try:
            RunDirectory.open(sys.argv[1])
        finally:
            print(time.monotonic() - started)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(other), str(run.path)], capture_output=True, text=True)
    assert result.returncode != 0
    assert float(result.stdout) < 1
    assert holder in result.stderr
    run.close()
    RunDirectory.open(tmp_path / "run").close()


def test_a_killed_writer_blocks_nobody(tmp_path: Path) -> None:
    killed = """
        import os, signal, sys
        from gemma_grpo.monitor.events import RunDirectory
        run = RunDirectory.create(sys.argv[1], "", {})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(killed), str(tmp_path / "run")])
    assert result.returncode == -9
    writer = tmp_path / "run" / ".writer"
    assert writer.read_text() != ""  # it could not take its name away
    with RunDirectory.open(tmp_path / "run"):
        assert writer.read_text().startswith(f"process {os.getpid()} on host ")
    assert not writer.exists()


def test_a_lock_that_another_machine_left_is_named_and_can_be_taken_away(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    lock = tmp_path / "run" / ".lock"
    with FileLock(lock):
        (tmp_path / "run" / ".writer").write_text("process 77 on host elsewhere.example\n")
        message = rf"is being written by process 77 on host elsewhere\.example\. .* stop it there\. If .* gone for good, delete {lock} and"
        with pytest.raises(RunDirectoryError, match=message):
            RunDirectory.open(tmp_path / "run")
        lock.unlink()  # as the message says
        RunDirectory.open(tmp_path / "run").close()


@pytest.mark.parametrize("text", ["", "process 5\n", "process 5 on host \x1b[2J\n and more", "\0" * 9])
def test_a_holder_that_did_not_write_its_name_is_another_process(tmp_path: Path, text: str) -> None:
    with new_run(tmp_path / "run"):
        (tmp_path / "run" / ".writer").write_text(text)
        with pytest.raises(RunDirectoryError, match=r"is being written by another process\. Wait until"):
            RunDirectory.open(tmp_path / "run")


NO_LOCKS = """
    import errno, fcntl, os, sys

    def flock(descriptor, operation):
        raise OSError(getattr(errno, sys.argv[2]), "no locks here")

    fcntl.flock = flock  # as on a file system that has none
    from gemma_grpo.monitor.events import RunDirectory, RunDirectoryError
    try:
        RunDirectory.create(sys.argv[1], "", {})
    except RunDirectoryError as error:
        print(error)
"""


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_refused_and_nothing_is_left_there(tmp_path: Path, code: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(NO_LOCKS), str(tmp_path / "run"), code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the file system has no locks, which keep a second run out. Choose an output_dir on a local disk." in result.stdout
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_opening_cuts_the_line_a_crash_tore(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    log = tmp_path / "run/metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2, "rew')
    RunDirectory.open(tmp_path / "run").close()
    assert log.read_bytes() == b'{"step": 1}\n'


def test_truncating_to_offsets_forgets_exactly_the_later_steps(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_metrics(StepRecord(1, {}, {"reward": 0.5}))
        run.append_samples(1, [scored_group("a")])
        offsets = run.offsets()
        after_one = {name: (run.path / name).read_bytes() for name in offsets}
        run.append_metrics(StepRecord(2, {}, {"reward": 0.6}))
        run.append_samples(2, [scored_group("b")])
        run.event("note", text="kept")
        run.truncate(offsets)
        assert {name: (run.path / name).read_bytes() for name in offsets} == after_one
        assert len(lines(run.path / "events.jsonl")) == 1


def test_a_log_shorter_than_its_checkpoint_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_metrics(StepRecord(1, {}, {}))
        with pytest.raises(RunDirectoryError, match=r"samples\.jsonl has 0 bytes, the checkpoint was made at 9"):
            run.truncate({"metrics.jsonl": 0, "samples.jsonl": 9})
        assert len(lines(run.path / "metrics.jsonl")) == 1


FULL_DISK = """
    import resource, signal, sys
    from gemma_grpo.monitor.events import RunDirectory, RunDirectoryError
    from gemma_grpo.types import StepRecord

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = RunDirectory.create(sys.argv[1], "seed: 0", {"status": "running"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
    refused = 0
    for step in range(40):
        try:
            run.append_metrics(StepRecord(step, {}, {"reward": step / 7}))
        except RunDirectoryError as error:
            refused += 1
            assert "metrics.jsonl was not written" in str(error), error
    try:
        run.write_json("run.json", {"filler": "x" * 1000})
    except RunDirectoryError as error:
        refused += 1
        assert "run.json was not written" in str(error), error
    print(refused)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a file size limit")
def test_a_write_the_disk_refuses_leaves_whole_lines_and_the_old_file(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) > 20
    kept = lines(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in kept] == list(range(len(kept)))
    assert 5 < len(kept) < 40
    assert json.loads((tmp_path / "run/run.json").read_text()) == {"status": "running"}
    assert list((tmp_path / "run").glob(".*.tmp")) == []


def test_run_paths_count_up_and_are_plain_names(tmp_path: Path) -> None:
    assert next_run_path(tmp_path / "runs", "google/Gemma-3-4b-it") == tmp_path / "runs" / "google-gemma-3-4b-it-1"
    for taken in ("demo-1", "demo-9", "demo-x", "demo-2-old"):
        (tmp_path / taken).mkdir()
    assert next_run_path(tmp_path, "demo") == tmp_path / "demo-10"
    assert next_run_path(tmp_path, "../..").name == "run-1"
    assert len(next_run_path(tmp_path, "x" * 300).name) < 64
