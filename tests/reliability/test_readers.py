"""Whoever reads a run while it is written sees whole records, whatever is appended, replaced, cut back or deleted meanwhile."""

from __future__ import annotations

import multiprocessing
import time
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from gemma_grpo.checkpoint import save_checkpoint
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.report import write_report
from gemma_grpo.monitor.run_files import read_run_files
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord

READS = 500
STEPS = 12
"""After so many steps the writer goes back to the beginning, as a run that is resumed does to its checkpoint."""


def groups(step: int) -> list[ScoredGroup]:
    prompt = Prompt("p1", "harmless-base", ({"role": "user", "content": "Hi"},), (2, 7), "c1")
    completion = Completion(f"step {step} " * 200, (5, 106), (-0.1, -0.2), "stop")
    return [ScoredGroup(RolloutGroup(prompt, (completion,) * 4, step), (1.0,) * 4, {"length": (2.0,) * 4}, (0.5,) * 4)]


def write_step(run: RunDirectory, step: int) -> None:
    run.append_metrics(StepRecord(step, {}, {f"metric_{index}": step / 7 for index in range(40)}))
    run.append_samples(step, groups(step))
    run.event("step_time", step=step, seconds={"rollout": 0.5})
    run.update_run(status="running", steps=step, filler="x" * 3000)
    run.write_json("evaluation.json", {"seconds": step, "samples": ["y" * 50] * 40})
    weights = {"x": torch.full((500,), float(step))}
    adapters = {"policy": {"a.safetensors": b"z" * 5000}}
    save_checkpoint(run.checkpoints, step, adapters=adapters, optimizer=weights, state={"twice": 2 * step}, keep=2)


def write_for_ever(path: Path, over: Event) -> None:
    """A run that goes on and on, back and forth."""
    with RunDirectory.open(path) as run:
        offsets = run.offsets()
        while not over.is_set():
            for step in range(1, STEPS):
                write_step(run, step)
            run.truncate(offsets)


def check_whole(path: Path) -> int:
    """Read everything once; the steps that were there."""
    files = read_run_files(path)
    assert files.problems == []
    assert all(set(line) == {"step", *(f"metric_{index}" for index in range(40))} for line in files.metrics)
    assert all(line["metric_3"] == line["step"] / 7 for line in files.metrics)
    assert all(set(event) == {"time", "kind", "step", "seconds"} for event in files.events)
    assert files.run["filler"] == "x" * 3000
    assert files.evaluation["samples"] == ["y" * 50] * 40
    for group in (*files.first_groups, *files.last_groups):
        assert [one["text"] for one in group["completions"]] == [f"step {group['step']} " * 200] * 4
    return len(files.metrics)


def test_five_hundred_reads_under_writes_see_nothing_half_written(tmp_path: Path) -> None:
    path, context = tmp_path / "run", multiprocessing.get_context("fork")
    with RunDirectory.create(path, "seed: 0\n", {"filler": "x" * 3000}) as run:
        run.write_json("evaluation.json", {"seconds": 0, "samples": ["y" * 50] * 40})
        run.write_json("reward/calibration.json", {"accuracy": {"value": 0.5}})
    over = context.Event()
    writer = context.Process(target=write_for_ever, args=(path, over), daemon=True)
    writer.start()
    try:
        seen, deadline = [check_whole(path)], time.monotonic() + 60
        while len(seen) < READS or not went_back(seen):
            assert writer.is_alive()
            assert time.monotonic() < deadline, "the writer does not get on"
            seen.append(check_whole(path))
            if len(seen) % (READS // 2) == 0:
                assert write_report(path).read_text(encoding="utf-8").rstrip().endswith("</html>")
    finally:
        over.set()
        writer.join(60)
    assert writer.exitcode == 0


def went_back(seen: list[int]) -> bool:
    """Whether the log was cut back while it was read, and had been written before."""
    return any(later < earlier for earlier, later in pairwise(seen)) and len(set(seen)) > STEPS // 2


def report_often(path: Path) -> None:
    for index in range(10):
        (path / "recipe.yaml").write_text(f"seed: {index}\n", encoding="utf-8")
        write_report(path)


def test_two_reports_at_once_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", "seed: 0\n", {}).close()
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=report_often, args=(tmp_path / "run",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in (tmp_path / "run").glob(".report*")] == []
