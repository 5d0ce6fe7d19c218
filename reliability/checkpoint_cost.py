"""What checkpoints and stops cost on the 270m shape: `python -m reliability.checkpoint_cost`, JSON out.

A run with the reference micro-batch (2 prompts, 8 completions, 2 planning steps, LoRA of rank 8 on q and v, float32 on a CPU) saves after
every step; a save's seconds are those between two lines of its events.jsonl, written just before and just after it. Then the same run,
with a judge as its reward, gets a SIGTERM at random moments of each phase; counted is the time until its process has ended. The weights
are random and the completions run to hh-rlhf's mean length: longer ones make steps longer, and saves no longer.
Exit code 1 when saving takes SHARE of a step or more, or a stop more than SECONDS.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import gemma_grpo.grpo.trainer  # before it is forked
import gemma_grpo.monitor.report  # noqa: F401
from bench.lengths import read_lengths
from bench.machine import commit, machine, versions
from bench.random_checkpoint import write_checkpoint
from bench.workload import LETTERS
from gemma_grpo.cli import main as command_line
from reliability.phases import PhaseByte
from reliability.writer_kills import RESULTS

SHARE, SECONDS = 0.05, 5.0
PROMPTS = 64
SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "advantage.no_signal_steps": 0,
    "num_generations": 8,
    "planning_steps": 2,
    "max_prompt_length": 512,
    "max_completion_length": 45,
    "precision": "fp32",
    "lora.r": 8,
    "lora.target_modules": "[q_proj, v_proj]",
    "save_steps": 1,
    "keep_checkpoints": 3,
    "evaluation.num_prompts": 0,
    "kl.step_limit": "null",
}
PHASES = ("rollout", "update", "reward", "saving", "update", "rollout", "reference", "reward", "update", "rollout")
"""Where the signals go, one after the other."""


def command(model: Path, rows: Path, run: Path, steps: int, reward: str) -> list[str]:
    """The command line of a run."""
    named = {"model_name": model, "dataset": rows, "output_dir": run, "max_steps": steps, "reward": f"{{{reward}: 1.0}}", **SETTINGS}
    return ["train", "gemma3-270m", *(f"{name}={value}" for name, value in named.items())]


def write_rows(path: Path, seed: int) -> Path:
    """Prompts as long as hh-rlhf's; of the filler tokenizer, a letter is a token."""
    generator = random.Random(seed)
    lengths = [min(generator.choice(read_lengths()["prompts"]), 400) for _ in range(PROMPTS)]
    texts = ["".join(generator.choice(LETTERS) for _ in range(length)) for length in lengths]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return path


class Process:
    """A command line in a fork, printing to a file, and what it is doing."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.byte, self.log = PhaseByte(), log
        self.pid = os.fork()
        if self.pid == 0:
            self._become(words)

    def _become(self, words: list[str]) -> None:
        code: Any = 1
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            self.byte.tell()
            sys.argv = ["gemma-grpo", *words]
            command_line()
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code if isinstance(code, int) else 1)

    def wait(self, phase: str) -> None:
        """Until it has come to a phase."""
        while self.byte.phase != phase:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                raise RuntimeError(f"the run ended before {phase}:\n{self._said()}")
            time.sleep(0.0005)

    def end(self, code: int) -> float:
        """Seconds until it has ended with this code. Raises RuntimeError where it is another."""
        started = time.monotonic()
        found = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if found != code:
            raise RuntimeError(f"the run ended with {found}, not {code}:\n{self._said()}")
        return time.monotonic() - started

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


def saves(run: Path) -> list[dict[str, float]]:
    """Seconds of each step and of the save after it; without the first step, which warms caches up."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {event["step"]: event for event in events if event["kind"] == "step_time"}
    found = []
    for event in events:
        if event["kind"] == "checkpoint" and event["step"] > 1:
            step = steps[event["step"]]
            seconds, save = sum(step["seconds"].values()), event["time"] - step["time"]
            found.append({"step": event["step"], "step_seconds": seconds, "save_seconds": save, "share": save / seconds})
    return found


def stop(words: list[str], log: Path, phase: str, seconds: float, generator: random.Random) -> dict[str, Any]:
    """A run stopped up to so many seconds after it came to a phase; the phase named is the one it was stopped in."""
    process = Process(words, log)
    process.wait(phase)
    time.sleep(generator.uniform(0, seconds))
    at = process.byte.phase
    os.kill(process.pid, signal.SIGTERM)
    return {"phase": at, "seconds": process.end(75)}


def phase_seconds(run: Path) -> dict[str, float]:
    """Seconds that each phase of a step takes."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return dict(next(event["seconds"] for event in reversed(events) if event["kind"] == "step_time"))


def measure(model: Path, root: Path, steps: int, stops: int, seed: int) -> dict[str, Any]:
    """Both parts."""
    generator, rows, load = random.Random(seed), write_rows(root / "rows.jsonl", seed), os.getloadavg()[0]
    Process(command(model, rows, root / "saving", steps + 1, "length"), root / "log").end(0)
    samples, phases = saves(root / "saving"), phase_seconds(root / "saving")
    for sample in samples:
        print("  step {step}: {step_seconds:.2f} s, its save {save_seconds:.3f} s, {share:.2%}".format(**sample), flush=True)
    ends = []
    for index in range(stops):
        phase = PHASES[index % len(PHASES)]
        words = command(model, rows, root / f"stopped-{index}", steps, "judge")
        ends.append(stop(words, root / "log", phase, max(0.8 * phases.get(phase, 0.0), 1.0), generator))
        print("  stopped in {phase}: {seconds:.2f} s".format(**ends[-1]), flush=True)
    shares, seconds = [sample["share"] for sample in samples], [end["seconds"] for end in ends]
    return {
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "step_phases": phases,
        "saves": samples,
        "share": {"min": min(shares), "median": statistics.median(shares), "max": max(shares), "limit": SHARE},
        "stops": ends,
        "stop_seconds": {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds), "limit": SECONDS},
    }


def main() -> None:
    """Measure, write the result, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270m", choices=["8m", "270m"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # before any fork: torch's threads do not live on in a child
    with tempfile.TemporaryDirectory() as temporary:
        model = write_checkpoint(options.model, Path(temporary) / "model")
        result = measure(model, Path(temporary), options.steps, options.stops, options.seed)
    head = {"machine": {**machine(), "threads": 1}, "commit": commit(), "versions": versions()}
    head |= {"model": options.model, "seed": options.seed}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**head, "settings": SETTINGS, **result}, indent=1) + "\n", encoding="utf-8")
    share, seconds = result["share"], result["stop_seconds"]
    print(
        f"a save takes {share['median']:.2%} of a step ({share['min']:.2%} to {share['max']:.2%}); "
        f"from SIGTERM to the end {seconds['median']:.2f} s ({seconds['min']:.2f} to {seconds['max']:.2f})"
    )
    if share["median"] >= SHARE or seconds["max"] > SECONDS:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
