"""`gemma-grpo demo`: the miniature from preferences to report, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from gemma_grpo.cli.summary import evaluation_lines, reward_lines, time_line
from gemma_grpo.cli.training import Overrides, update_line
from gemma_grpo.config import load_recipe, parse_overrides

Result = TypeVar("Result")


def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides everything random.")] = 0,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Run directory; default runs/miniature-<number>.")] = None,
) -> None:
    """Take the whole road on a CPU with the tiny Gemma 3 that ships with the package: no account, no download."""
    options: dict[str, Any] = {"seed": seed, **({"output_dir": str(output_dir)} if output_dir else {})}
    settings = options | parse_overrides(overrides or [], "miniature")
    print("A tiny Gemma 3 in a small world whose true score is known, but never shown to training.")
    print(update_line(load_recipe("miniature", settings)), flush=True)

    from gemma_grpo.grpo.trainer import GRPOTrainer
    from gemma_grpo.monitor.report import write_report
    from gemma_grpo.monitor.terminal import ProgressView

    seconds: dict[str, float] = {}
    trainer = _timed(seconds, "loading", lambda: GRPOTrainer.from_recipe("miniature", settings, view=ProgressView()))
    calibration = _timed(seconds, "reward adapter", trainer.train_reward)
    _timed(seconds, "training", trainer.train)
    evaluation = _timed(seconds, "evaluation", trainer.evaluate)
    path = _timed(seconds, "report", lambda: write_report(trainer.run_dir))
    lines = [*reward_lines(calibration), *evaluation_lines(evaluation), time_line(trainer.run_dir, seconds)]
    print("\n".join(["", *lines, f"report: {path}"]))


def _timed(seconds: dict[str, float], name: str, stage: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    result = stage()
    seconds[name] = time.perf_counter() - start
    return result
