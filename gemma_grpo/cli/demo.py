"""`gemma-grpo demo`: the miniature from preferences to report, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_grpo.cli.printing import say
from gemma_grpo.cli.summary import evaluation_lines, read_calibration, reward_lines, time_line
from gemma_grpo.cli.training import Overrides, update_line
from gemma_grpo.config import load_recipe, parse_overrides

UNRESTRAINED: dict[str, Any] = {
    "kl.placement": "off",
    "reward_model.shaping": "none",
    "reward": {"generative": 1.0},
    "witness.every": 1,
    "witness.num_prompts": 1000,
    "witness.num_completions": 2,
}
"""What --overoptimise takes away, and how closely it looks: every held-out prompt, twice, after every step."""


def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides everything random.")] = 0,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Run directory; default runs/miniature-<number>.")] = None,
    overoptimise: Annotated[
        bool, typer.Option("--overoptimise", help="Train without any restraint until reward and true score part, and show where.")
    ] = False,
) -> None:
    """Take the whole road on a CPU with the tiny Gemma 3 that ships with the package: no account, no download."""
    start = time.perf_counter()
    options: dict[str, Any] = {"seed": seed, **({"output_dir": str(output_dir)} if output_dir else {})}
    settings = (UNRESTRAINED if overoptimise else {}) | options | parse_overrides(overrides or [], "miniature")
    say("A tiny Gemma 3 in a small world whose true score is known, but never shown to training.")
    if overoptimise:
        say("The wind tunnel: no KL penalty, no bound on the reward, no rules. Watch the reward rise, and what the witnesses say.")
    say(update_line(load_recipe("miniature", settings)), flush=True)

    from gemma_grpo.grpo.trainer import GRPOTrainer
    from gemma_grpo.monitor import watched
    from gemma_grpo.monitor.report import write_report
    from gemma_grpo.monitor.run_files import read_run_files
    from gemma_grpo.monitor.terminal import ProgressView

    trainer = GRPOTrainer.from_recipe("miniature", settings, view=ProgressView())
    evaluation = trainer.train()
    path = write_report(trainer.run_dir)
    seconds = time.perf_counter() - start
    lines = [*reward_lines(read_calibration(trainer.run_dir)), *evaluation_lines(evaluation), time_line(trainer.run_dir, seconds)]
    parted = watched.parting(read_run_files(trainer.run_dir).looks) if overoptimise else None
    say("", *lines, *watched.parting_lines(parted), f"report: {path}")
