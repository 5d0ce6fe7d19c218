"""A whole GRPO run on the float16 base, beside the float32 run of the same seed and beside what another seed changes."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo import GRPOTrainer
from gemma_grpo.miniature.gold import gold_score

STEPS = 20


def gold(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The miniature world's exact score: a reward that needs no training."""
    return [gold_score(prompt[-1]["content"], reply[0]["content"]).total for prompt, reply in zip(prompts, completions, strict=True)]


def reward_curve(folder: Path, precision: str, seed: int) -> list[float]:
    """Mean reward of each of the first steps on the miniature."""
    trainer = GRPOTrainer(
        model_name="miniature",
        dataset="miniature",
        reward=gold,
        output_dir=str(folder / f"{precision}-{seed}"),
        learning_rate=2.5e-3,
        batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        max_prompt_length=96,
        max_completion_length=36,
        precision=precision,
        seed=seed,
        save_steps=0,
        **{"evaluation.num_prompts": 0, "kl.beta": 0.4, "kl.ref_target": None, "memory.token_budget": 4096},
    )
    trainer.train()
    assert trainer.precision.get("divisor") == (64 if precision == "fp16_rescaled" else None)
    lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["reward"] for line in lines]


def distance(one: list[float], other: list[float]) -> float:
    """Root mean square difference of two curves."""
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(one, other, strict=True)))


@pytest.mark.slow
def test_a_run_in_rescaled_float16_follows_the_float32_run(tmp_path: Path) -> None:
    exact = [reward_curve(tmp_path, "fp32", seed) for seed in range(3)]
    half = reward_curve(tmp_path, "fp16_rescaled", 0)
    noise = [distance(exact[0], exact[1]), distance(exact[0], exact[2]), distance(exact[1], exact[2])]
    # the same prompts and the same random numbers: nearer than two seeds ever are
    assert distance(half, exact[0]) < 0.5 * min(noise), (half, exact)
    # and it learned what the others did
    gains = [statistics.fmean(curve[-5:]) - statistics.fmean(curve[:5]) for curve in (half, exact[0])]
    assert gains[0] == pytest.approx(gains[1], abs=min(noise))
    assert min(gains) > 0
