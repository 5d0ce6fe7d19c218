"""Kill whole training runs at random moments: `python -m reliability.trainer_kills --kills 1000`, JSON out.

One run is never disturbed. Others with the same settings are killed (SIGKILL) again and again - while loading, training the reward,
sampling, updating, saving, pruning, evaluating - and started again each time, until they are done. Then adapter, last checkpoint, logs and
evaluation must be those of the first, byte for byte. Exit code 1 where they are not. On one thread: one order of additions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench.machine import commit, machine, versions
from gemma_grpo import GRPOTrainer
from gemma_grpo.monitor.terminal import ProgressView
from reliability.writer_kills import RESULTS

SETTINGS: dict[str, Any] = {
    "model_name": "miniature",
    "reward": {"generative": 1.0, "length": 0.1},
    "learning_rate": 1e-2,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 3,
    "planning_steps": 2,
    "max_completion_length": 6,
    "max_steps": 12,
    "epochs": 2.0,
    "save_steps": 1,
    "keep_checkpoints": 2,
    "lora.dropout": 0.1,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_updates": 2,
    "kl.ref_target": 0.001,
    "entropy.threshold": 2.0,
    "evaluation.num_prompts": 3,
    "reward_model.max_pairs": 8,
    "data.holdout": 0.25,
}
"""Everything that has a memory: Adam, both controllers, the schedule, dropout, the epoch, a trained reward."""
COMPARED = ("metrics.jsonl", "samples.jsonl", "reward/calibration.json", "adapter")
"""And the last checkpoint; a kill before the oldest is deleted leaves one more."""


def rows() -> list[dict[str, str]]:
    """Two dozen preferences; some 5 steps are an epoch, so that its end is met."""
    asked = [f"Human: what is number {index}, please?\n\nAssistant:" for index in range(24)]
    return [{"chosen": f"\n\n{text} it is {index}.", "rejected": f"\n\n{text} no."} for index, text in enumerate(asked)]


def train(folder: Path) -> None:
    """Begin the run in this folder, or go on with it."""
    trainer = GRPOTrainer(dataset=rows(), output_dir=str(folder), view=ProgressView(), **SETTINGS)
    trainer.train(resume_from_checkpoint=(folder / "recipe.yaml").is_file())


def in_a_child(folder: Path, log: Path, wait: float | None) -> tuple[bool, str]:
    """Train in a child, killed after `wait` seconds; whether it ended by itself, and what it was doing when it was killed."""
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 1
        try:
            train(folder)
            code = 0
        finally:
            os._exit(code)
    ended, status, deadline = 0, 0, time.monotonic() + (wait or 0.0)
    while wait is not None and not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        if wait is not None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False, _doing(folder)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the run ended with an error:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    return True, "done"


def _doing(folder: Path) -> str:
    """What a killed run was at, as far as its files tell."""
    if not (folder / "recipe.yaml").is_file():
        return "loading, no run yet"
    if any(path.name.startswith(".") for path in (folder / "checkpoints").glob(".*")):
        return "saving or pruning"
    if (folder / "adapter").is_dir():
        return "evaluating"
    return "training" if (folder / "checkpoints").is_dir() else "loading or training the reward"


def content(folder: Path) -> dict[str, bytes]:
    """Every file that has to be the same, by name; the evaluation without its time."""
    found: dict[str, bytes] = {}
    for name in (*COMPARED, f"checkpoints/{max(path.name for path in (folder / 'checkpoints').glob('step-*'))}"):
        paths = [folder / name] if (folder / name).is_file() else [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
        found |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    evaluation = {**json.loads((folder / "evaluation.json").read_text(encoding="utf-8")), "seconds": 0}
    return {**found, "evaluation.json": json.dumps(evaluation).encode()}


def run(kills: int, seed: int, longest: float | None = None) -> dict[str, Any]:
    """Runs killed that often in all; `longest` are the seconds until a kill at most, by default a third of an undisturbed run."""
    generator, moments, differing = random.Random(seed), Counter[str](), []
    done = runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        started = time.perf_counter()
        in_a_child(root / "whole", root / "log", None)
        longest = longest or (time.perf_counter() - started) / 3
        expected = content(root / "whole")
        while done < kills:
            folder, finished = root / f"run-{runs}", False
            while not finished:
                finished, doing = in_a_child(folder, root / "log", generator.uniform(0, longest) if done < kills else None)
                if not finished:
                    done += 1
                    moments[doing] += 1
            found = content(folder)
            differing += [f"run {runs}: {name}" for name in sorted({**found, **expected}) if found.get(name) != expected.get(name)]
            runs += 1
    return {
        "kills": done,
        "seed": seed,
        "runs": runs,
        "killed_while": dict(moments),
        "files_compared": len(expected),
        "differing": differing[:20],
        "mismatches": len(differing),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Kill, write the result, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "trainer_kills.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"machine": machine(), "commit": commit(), "versions": versions(), "settings": SETTINGS, **run(options.kills, options.seed)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['kills']} kills of {report['runs']} runs, {report['killed_while']}: {report['mismatches']} files differ")
    if report["mismatches"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
