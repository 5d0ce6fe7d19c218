"""Run directories with made-up content, written by the run's own writer, as long as one likes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord

RECIPE = "model_name: miniature\ndataset: miniature\nseed: {seed}\n"


def group(number: int, text: str = "a reply", *, source: str = "helpful", flat: bool = False, finish: str = "stop") -> ScoredGroup:
    """Two completions; equal rewards in a flat one."""
    prompt = Prompt(f"p{number}", source, ({"role": "user", "content": f"question {number}: {text}"},), (2,), "c")
    completions = tuple(Completion(f"{text} {index}", (1, 2, 3), (0.0, 0.0, 0.0), finish) for index in range(2))  # type: ignore[arg-type]
    rewards = (0.5, 0.5) if flat else (0.25, 0.75)
    return ScoredGroup(RolloutGroup(prompt, completions, 0), rewards, {"generative": rewards}, (0.0, 0.0) if flat else (-1.0, 1.0))


def look(step: int, text: str = "a reply", *, alarm: bool = False) -> dict[str, Any]:
    """A look with two replies, the second of which gains reward and loses gold."""
    replies = []
    for index in range(2):
        reply = {
            "prompt_id": f"h{index}",
            "source": "helpful",
            "kind": "benign",
            "text": f"{text} at {step}",
            "length": 3,
            "clipped": False,
        }
        reply |= {"refused": False, "proxy": 0.1 * step * (1 + index), "gold": 0.5 + (0.01 if index == 0 else -0.02) * step, "kl": 0.1}
        reply |= {} if step else {"prompt": [{"role": "user", "content": f"held-out question {index}"}]}
        replies.append(reply)
    metrics = {"proxy": 0.15 * step, "gold": 0.5 - 0.005 * step, "kl_sequence": 0.1 * step, "length": 3.0}
    said = {"level": "alert", "step": step, "witness": "gold", "text": f"the reward rose, gold fell at step {step}", "samples": []}
    return {"step": step, "metrics": metrics, "replies": replies, "alarms": [said] if alarm else []}


def write_step(run: RunDirectory, step: int, text: str = "a reply") -> None:
    """One step with three groups: a usual one, one without a signal, one cut off and of another source."""
    groups = [group(step, text), group(1000 + step, text, flat=True), group(2000 + step, text, source="harmless", finish="length")]
    metrics = {"reward": 0.1 * step, "reward_std": 0.1, "kl": 0.01 * step, "entropy": 1.0, "completions/mean_length": 3.0, "loss": 0.0}
    run.append_step(StepRecord(step, {"rollout": 1.0, "update": 3.0}, metrics), groups)


def write_run(path: Path, steps: int, text: str = "a reply", *, seed: int = 0, evaluated: bool = True) -> Path:
    """A finished run, or one that nobody evaluated."""
    info = {
        "status": "running",
        "started": 1000.0,
        "model": "miniature",
        "dataset": "miniature",
        "total_steps": steps,
        "data": {"rows": 40},
    }
    with RunDirectory.create(path, RECIPE.format(seed=seed), info) as run:
        run.append_look(look(0, text))
        for step in range(1, steps + 1):
            write_step(run, step, text)
        run.append_look(look(max(1, steps), text, alarm=True))
        if evaluated:
            gold = {"before": 0.5, "after": 0.7, "gain": 0.2, "interval": [0.1, 0.3], "n": 40}
            run.write_json("evaluation.json", {"gold": gold, "seconds": 1.0})
        run.ended(steps)
    return path
