"""Whole trainings with bad rewards: each ends with an error or with the failures counted, none as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bad_rewards import KINDS

from gemma_grpo.grpo.step import reward_metrics
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.base import RewardError, StackScores
from gemma_grpo.reward.isolated import call_isolated
from gemma_grpo.stopping import Stopped

ONE_STEP = {"max_steps": 1}
SOME_VALUES = ["nan", "infinite in float32", "true", "a number as text", "a tensor of one"]
SOME_FAILURES = [
    *("result: nothing", "result: one score for all", "result: a generator"),
    *("raise: an error", "raise: exit with success", "raise: the end of a generator"),
    *("raise: endless recursion", "raise: an async cancellation"),
    *("process: sleep", "process: ended with success", "process: a segmentation fault", "process: killed"),
]
"""Of every sort one or two; all of them in test_bad_rewards.py."""
SOON = 30.0


def with_deadline(kind: str) -> dict[str, float | None]:
    return {"reward_function.timeout": None if KINDS[kind].here else KINDS[kind].timeout}


def assert_failed(folder: Path) -> None:
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "failed"
    assert info["error"].startswith("RewardError: reward ")
    assert (folder / "metrics.jsonl").read_text(encoding="utf-8") == ""
    assert not (folder / "adapter").exists()


@pytest.mark.parametrize("kind", [f"score: {name}" for name in SOME_VALUES] + SOME_FAILURES)
def test_a_bad_reward_ends_the_training(tiny_trainer, tmp_path, kind):
    with pytest.raises(RewardError, match=r"reward '(function|_recursing|_cancelled|<lambda>)' "):
        tiny_trainer(reward=KINDS[kind].function, output_dir=str(tmp_path / "run"), **with_deadline(kind), **ONE_STEP).train()
    assert_failed(tmp_path / "run")


@pytest.mark.parametrize("kind", SOME_FAILURES)
def test_a_reward_that_always_fails_ends_the_training_that_may_skip_as_well(tiny_trainer, tmp_path, kind):
    settings = {"reward_function.on_failure": "skip", "output_dir": str(tmp_path / "run"), **with_deadline(kind), **ONE_STEP}
    # one group of three is half of the six, which it may skip; the second is too many
    message = r"left 6 of 6 completions without a score \(6 .*\), more than reward_function\.max_skipped \(0\.5\) allows\. The last: it "
    with pytest.raises(RewardError, match=message):
        tiny_trainer(reward=KINDS[kind].function, **settings).train()
    assert_failed(tmp_path / "run")


@pytest.mark.parametrize("name", SOME_VALUES)
def test_a_bad_score_that_may_be_skipped_is_in_the_metrics_and_the_samples(train_tiny, name):
    run = train_tiny(reward=KINDS[f"score: {name}"].function, **{"reward_function.on_failure": "skip"}, **ONE_STEP)
    assert run.metrics("rewards/function/skipped") == [1.0]
    assert run.metrics("unscored") == [1.0]
    assert [reward for row in run.completions("reward") for reward in row].count(None) == 1
    assert run.json("run.json")["status"] == "finished"


def test_a_prompt_it_fails_on_is_left_out_and_the_others_are_learned_from(train_tiny, tmp_path):
    first: list[str] = []

    def picky(prompts, completion_ids, **columns):
        texts = {messages[-1]["content"] for messages in prompts}
        first[:] = first or [min(texts)]
        if first[0] in texts:
            raise LookupError(f"not for {first[0]}")
        return [sum(ids) / len(ids) for ids in completion_ids]

    run = train_tiny(reward=picky, **{"reward_function.on_failure": "skip"}, **ONE_STEP)
    assert run.metrics("rewards/picky/skipped") == [3.0]
    left_out = [n for n, row in enumerate(run.completions("reward")) if row == [None] * 3]
    advantages = run.completions("advantage")
    assert len(left_out) == 1
    assert advantages[left_out[0]] == [0.0] * 3
    assert any(advantages[1 - left_out[0]])
    assert any(value.any() for name, value in run.adapter().items() if "lora_B" in name)  # it began at 0


def test_a_deadline_changes_nothing_in_a_run_that_keeps_it(train_tiny):
    with_one, without = train_tiny(**{"reward_function.timeout": 600}), train_tiny()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert with_one.text(name) == without.text(name)
    adapters = with_one.adapter(), without.adapter()
    assert all(value.equal(adapters[1][name]) for name, value in adapters[0].items())


def test_a_call_in_its_own_process_does_not_let_go_of_the_run(tmp_path) -> None:
    program = f"from gemma_grpo.monitor.events import RunDirectory; RunDirectory.open({str(tmp_path / 'run')!r})"
    with RunDirectory.create(tmp_path / "run", "seed: 0\n", {}):
        assert call_isolated(lambda: 5, 60.0) == 5
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert f"is being written by process {os.getpid()}" in done.stderr


def test_what_is_skipped_is_a_metric_only_where_it_may_be() -> None:
    scores = [[1.0, None]]
    assert "rewards/mine/skipped" not in reward_metrics(StackScores(scores, {"mine": scores}))
    assert reward_metrics(StackScores(scores, {"mine": scores}, {"mine": 0}))["rewards/mine/skipped"] == 0.0


def test_a_run_is_asked_to_stop_while_a_reward_hangs(tiny_trainer, tmp_path):
    def hangs(**columns):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / "pid.tmp").write_text(str(os.getpid()), encoding="utf-8")
        (tmp_path / "pid.tmp").rename(tmp_path / "pid")
        time.sleep(600)

    def terminate():
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    trainer = tiny_trainer(reward=hangs, output_dir=str(tmp_path / "run"), **{"reward_function.timeout": 600}, **ONE_STEP)
    thread.start()
    with pytest.raises(Stopped, match="by SIGTERM"):
        trainer.train()
    thread.join()
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "stopped"
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text(encoding='utf-8')}").exists()  # waited for


def test_a_trainer_that_is_killed_while_its_reward_hangs_leaves_no_process_behind(small_model_dir, tmp_path):
    program = f"""
import os, signal, time
from gemma_grpo import GRPOTrainer

def hangs(**columns):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open({str(tmp_path / "pid.tmp")!r}, "w").write(str(os.getpid()))
    os.rename({str(tmp_path / "pid.tmp")!r}, {str(tmp_path / "pid")!r})
    while True:
        pass

GRPOTrainer(
    model_name={str(small_model_dir)!r}, dataset=[{{"prompt": f"question {{n}}?"}} for n in range(8)], reward=hangs,
    output_dir={str(tmp_path / "run")!r}, batch_size=1, gradient_accumulation_steps=1, num_generations=2, max_completion_length=4,
    **{{"reward_function.timeout": 600, "data.holdout": 0.25, "evaluation.num_prompts": 0}},
).train()
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while not (tmp_path / "pid").exists() and time.monotonic() < ends and trainer.poll() is None:
        time.sleep(0.05)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text(encoding='utf-8')}/stat")
    assert state.read_text(encoding="utf-8").rpartition(") ")[2][0] == "R"
    trainer.kill()
    trainer.wait(timeout=SOON)
    ends = time.monotonic() + SOON
    while state.exists() and state.read_text(encoding="utf-8").rpartition(") ")[2][0] not in "ZX" and time.monotonic() < ends:
        time.sleep(0.01)
    assert not state.exists() or state.read_text(encoding="utf-8").rpartition(") ")[2][0] in "ZX"
