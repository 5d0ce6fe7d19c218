"""Kill whole training runs at random moments: `python -m reliability.trainer_kills --kills 1000`, JSON out.

One run is never disturbed. Others with the same settings are killed (SIGKILL) again and again - while loading, training the reward,
sampling, updating, saving, pruning, evaluating - and started again each time, until they are done. Then adapter, last checkpoint, logs and
evaluation must be those of the first, byte for byte. Exit code 1 where they are not. On one thread: one order of additions.
What a run was doing when it was killed, it said a moment before, in a byte of memory shared with the one who kills (reliability/phases.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import commit, machine, versions
from gemma_grpo import GRPOTrainer
from gemma_grpo.monitor.terminal import ProgressView
from reliability.phases import PhaseByte
from reliability.writer_kills import RESULTS

FEWEST_STEPS, A_SAVE = 6, 0.01
"""And seconds that a save takes at least."""
AT_THE_END = 0.1
"""Share of a run's kills that are kept for its evaluation, after the last step."""
AIMED = {"loading": 0.2, "saving": 0.1, "pruning": 0.1}
"""Shares of the other kills that are kept for phases which are short beside a step."""

SETTINGS: dict[str, Any] = {
    "model_name": "miniature",
    "reward": {"generative": 1.0, "length": 0.1},
    "learning_rate": 1e-2,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 3,
    "planning_steps": 2,
    "max_completion_length": 6,
    "save_steps": 1,
    "keep_checkpoints": 2,
    "lora.dropout": 0.1,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_updates": 2,
    "kl.ref_target": 0.001,
    "kl.hard_stop_steps": 0,
    "entropy.threshold": 2.0,
    "evaluation.num_prompts": 3,
    "witness.every": 4,
    "witness.num_prompts": 3,
    "reward_model.max_pairs": 8,
    "data.holdout": 0.25,
}
"""Everything that has a memory: Adam, both controllers, the schedule, dropout, the epoch, a trained reward. Without the length."""
COMPARED = (
    *("metrics.jsonl", "samples.jsonl", "witnesses.jsonl", "reward/calibration.json", "witness/calibration.json", "adapter", "best"),
)
"""And the last checkpoint; a kill before the oldest is deleted leaves one more."""


def rows() -> list[dict[str, str]]:
    """Two dozen preferences; some 5 steps are an epoch, so that its end is met."""
    asked = [f"Human: what is number {index}, please?\n\nAssistant:" for index in range(24)]
    return [{"chosen": f"\n\n{text} it is {index}.", "rejected": f"\n\n{text} no."} for index, text in enumerate(asked)]


def train(folder: Path, steps: int) -> None:
    """Begin the run in this folder, or go on with it."""
    settings = {**SETTINGS, "max_steps": steps, "epochs": float(steps)}
    trainer = GRPOTrainer(dataset=rows(), output_dir=str(folder), view=ProgressView(), **settings)
    trainer.train(resume_from_checkpoint=(folder / "recipe.yaml").is_file())


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after the run has come to a phase, None being its start; in any case where another one begins.

    A phase as short as a pruning can be over before it was seen: `patience` are the seconds after the first rollout in which it has to be.
    However fast the machine has become since it was timed, no more than so many `rollouts` are begun.
    """

    after: str | None
    seconds: float
    before: str | None = None
    patience: float = math.inf
    rollouts: float = math.inf


@dataclass(frozen=True)
class Times:
    """Seconds of an undisturbed run: until it is loaded, until its first step is saved, of a step, of its evaluation."""

    load: float
    first: float
    step: float
    evaluation: float


def in_a_child(folder: Path, log: Path, steps: int, moment: Moment | None) -> str | None:
    """Train in a child, killed at a moment; what it was doing then, None when it ended by itself."""
    byte = PhaseByte()
    child = os.fork()
    if child == 0:
        _train_and_exit(folder, log, steps, byte, moment)
    status = _wait(child, byte, moment)
    if os.WIFSIGNALED(status):
        return byte.phase
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the run ended with an error:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    return None


def _train_and_exit(folder: Path, log: Path, steps: int, byte: PhaseByte, moment: Moment | None) -> None:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        byte.tell() if moment is None else byte.tell(before=moment.before, rollouts=moment.rollouts)
        train(folder, steps)
        code = 0
    finally:
        os._exit(code)


def _wait(child: int, byte: PhaseByte, moment: Moment | None) -> int:
    """Until the child ends or is killed; its status."""
    if moment is None:
        return os.waitpid(child, 0)[1]
    reached, deadline = moment.after is None, time.monotonic() + moment.seconds if moment.after is None else math.inf
    while (now := time.monotonic()) < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if not reached and byte.phase == moment.after:
            reached, deadline = True, now + moment.seconds
        elif deadline == math.inf and byte.phase == "rollout":
            deadline = now + moment.patience
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def steps_saved(folder: Path) -> int:
    """Of the newest checkpoint, 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")), default=0)


def next_moment(folder: Path, kill: int, kills: int, steps: int, times: Times, generator: random.Random) -> Moment:
    """When to kill a run for the time with this number, so that all of them are over its whole length."""
    done = steps_saved(folder)
    if done == 0:
        return Moment(None, generator.uniform(0, 1.3 * times.first), before="pruning")  # three steps on at most
    if done >= steps or kill >= (1 - AT_THE_END) * kills:
        return Moment("evaluation", generator.uniform(0, 0.25 * times.evaluation))
    aim = generator.choices([*AIMED, "a step"], [*AIMED.values(), 1 - sum(AIMED.values())])[0]
    if aim == "loading":
        return Moment("loading", generator.uniform(0, times.load), before="rollout")
    if aim != "a step":
        return Moment(aim, generator.uniform(0, A_SAVE), before="evaluation", patience=3 * times.step, rollouts=2)
    if done / steps > kill / ((1 - AT_THE_END) * kills):  # ahead: this step must not be finished, however fast the machine is now
        return Moment("rollout", generator.uniform(0, times.step), before="saving")
    behind = (kill + 1) / ((1 - AT_THE_END) * kills) * steps - done
    return Moment("rollout", generator.uniform(0, 4 * times.step), before="evaluation", rollouts=max(1, math.ceil(behind)))


def content(folder: Path) -> dict[str, bytes]:
    """Every file that has to be the same, by name; the evaluation without its time."""
    found: dict[str, bytes] = {}
    for name in (*COMPARED, f"checkpoints/{max(path.name for path in (folder / 'checkpoints').glob('step-*'))}"):
        paths = [folder / name] if (folder / name).is_file() else [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
        found |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    evaluation = {**json.loads((folder / "evaluation.json").read_text(encoding="utf-8")), "seconds": 0}
    return {**found, "evaluation.json": json.dumps(evaluation).encode()}


def times_of(folder: Path, started: float) -> Times:
    """Of an undisturbed run, by its own events; `started` in seconds since 1970."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    saved = [event["time"] for event in events if event["kind"] == "checkpoint"]
    loaded = next(event["time"] for event in events if event["kind"] == "start")
    return Times(loaded - started, saved[0] - started, (saved[-1] - saved[0]) / (len(saved) - 1), events[-1]["time"] - saved[-1])


def killed(folder: Path, log: Path, steps: int, kills: int, times: Times, generator: random.Random) -> list[str]:
    """One run, killed so often and then left to finish; what it was doing each time."""
    doing: list[str] = []
    while len(doing) < kills:
        found = in_a_child(folder, log, steps, next_moment(folder, len(doing), kills, steps, times, generator))
        if found is None:
            return doing
        doing.append(found)
    in_a_child(folder, log, steps, None)
    return doing


def run(kills: int, kills_per_run: int, seed: int) -> dict[str, Any]:
    """So many kills in all; a run that ends before its share of them counts for those it had, and another takes the rest."""
    generator, moments, per_run, differing = random.Random(seed), Counter[str](), list[int](), list[str]()
    kills_per_run, began = min(kills, kills_per_run), time.perf_counter()
    steps = max(FEWEST_STEPS, kills_per_run)
    with tempfile.TemporaryDirectory() as temporary:
        root, log = Path(temporary), Path(temporary) / "log"
        started = time.time()
        in_a_child(root / "whole", log, steps, None)
        times, expected = times_of(root / "whole", started), content(root / "whole")
        while sum(per_run) < kills:
            folder = root / f"run-{len(per_run)}"
            doing = killed(folder, log, steps, min(kills_per_run, kills - sum(per_run)), times, generator)
            found = content(folder)
            names = [name for name in sorted({**found, **expected}) if found.get(name) != expected.get(name)]
            differing += [f"run {len(per_run)}: {name}" for name in names]
            moments.update(doing)
            per_run.append(len(doing))
            shutil.rmtree(folder)
    return {
        "kills": sum(per_run),
        "seed": seed,
        "kills_of_each_run": per_run,
        "steps_of_a_run": steps,
        "killed_while": dict(moments.most_common()),
        "files_compared": len(expected),
        "differing": differing[:20],
        "mismatches": len(differing),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Kill, write the result, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--kills-per-run", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "trainer_kills.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.kills, options.kills_per_run, options.seed)
    report = {"machine": machine(), "commit": commit(), "versions": versions(), "settings": SETTINGS, **result}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    runs = len(report["kills_of_each_run"])
    print(f"{report['kills']} kills of {runs} runs, {report['killed_while']}: {report['mismatches']} files differ")
    if report["mismatches"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
