"""How near decoding and learning come to what the machine can do: `python -m bench.bounds --model 4b`, JSON out.

16 rows decode: the time of a token is that of a rollout of 129 tokens less one of a single token, over 128, beside the bytes that
such a step must read at the measured rate. The update's gradient: the operations of its forward, recomputed and backward passes at the
measured rate of matrix products. profile/work.py counts both, profile/ceilings.py measures the rates. Exit code 1 where a share is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.machine import commit, machine, versions
from bench.own_worker import OwnSide
from bench.random_checkpoint import shape_of_size, write_checkpoint
from bench.step import MODELS, RESULTS, setting_of
from bench.workload import StepLengths
from gemma_grpo.grpo.step import policy_batch, sampling_params
from gemma_grpo.profile.ceilings import Ceilings, measure_ceilings, synchronised_clock
from gemma_grpo.profile.work import Arithmetic, Lengths
from gemma_grpo.types import RolloutGroup

PROMPT, TOKENS, NUM_PROMPTS, REPEATS = 99, 128, 2, 5
"""hh-rlhf's median prompt; tokens timed; prompts of 8 completions each; measurements, after one that is not counted."""
LEAST = {"decode": 0.6, "update": 0.45}
"""Share of the bound to be reached on a CUDA GPU with the 4b shape."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Median of REPEATS calls, after one."""
    clock = synchronised_clock(device)

    def once() -> float:
        started = clock()
        work()
        return clock() - started

    once()
    return median(once() for _ in range(REPEATS))


def decoding(side: OwnSide, ceilings: Ceilings, arithmetic: Arithmetic) -> dict[str, float]:
    """Seconds of one token of all rows, and the least that reading its bytes takes."""

    def rollout(index: int) -> list[RolloutGroup]:
        side.prepare(index)
        return side.stepper.engine.sample(side.prompts[index], sampling_params(side.config, index))

    short, long = (seconds_of(lambda index=index: rollout(index), side.model.device) for index in (0, 1))
    steps = arithmetic.rollout([Lengths(PROMPT, (TOKENS + 1,) * side.setting.num_generations)] * NUM_PROMPTS)[1:]
    bound = sum(step.bytes for step in steps) / ceilings.bytes.value / len(steps)
    return {"seconds": (long - short) / TOKENS, "bound_seconds": bound, "share": bound * TOKENS / (long - short)}


def updating(side: OwnSide, ceilings: Ceilings, arithmetic: Arithmetic) -> dict[str, float]:
    """Seconds of the gradient of a step, and the least that its operations take."""
    side.prepare(1)
    stepper, config = side.stepper, side.config
    groups = stepper.engine.sample(side.prompts[1], sampling_params(config, 1))
    batch = policy_batch(side.model, groups, stepper.rewards.score(groups), stepper.rewards.weights, config, config.kl.beta)
    seconds = seconds_of(lambda: stepper.updater._accumulate(batch), side.model.device)
    lengths = [Lengths(PROMPT, (TOKENS + 1,) * side.setting.num_generations)] * NUM_PROMPTS
    passes = arithmetic.update(lengths, recomputed=config.gradient_checkpointing)
    bound = sum(one.operations for one in passes) / ceilings.operations.value
    return {"seconds": seconds, "bound_seconds": bound, "share": bound / seconds}


def measure(model: str, threads: int) -> dict[str, Any]:
    """Both shares of a model on this machine."""
    torch.set_num_threads(threads)
    limits = {"max_prompt_length": PROMPT, "max_completion_length": TOKENS + 1}
    setting = replace(setting_of(model, "a", threads), num_prompts=NUM_PROMPTS, batch_size=NUM_PROMPTS, **limits)
    rows = NUM_PROMPTS * setting.num_generations
    lengths: Sequence[StepLengths] = [StepLengths((PROMPT,) * NUM_PROMPTS, (tokens,) * rows) for tokens in (1, TOKENS + 1)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(model, Path(temporary) / "model", text_only=True)
        side = OwnSide(setting, str(folder), Path(temporary) / "adapter", lengths)
        shape, dtype = shape_of_size(model), side.model.dtype
        arithmetic = Arithmetic(shape, side.config.lora, side.model.head_weight.element_size())
        weight_bytes = arithmetic.forward([], adapter=False, head_rows=1).bytes
        ceilings = measure_ceilings(side.model.device, dtype, shape, weight_bytes)
        shares = {"decode": decoding(side, ceilings, arithmetic), "update": updating(side, ceilings, arithmetic)}
    head = {"machine": {**machine(), "threads": threads}, "commit": commit(), "versions": versions(), "setting": setting.to_dict()}
    return {**head, "ceilings": ceilings.to_dict(), "rows": rows, **shares}


def main() -> None:
    """Measure, write, and say what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="4b" if torch.cuda.is_available() else "8m")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="default: bench/results/bounds-MODEL.json")
    options = parser.parse_args()
    report = measure(options.model, options.threads)
    out: Path = options.out or RESULTS / f"bounds-{options.model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, one in ((name, report[name]) for name in LEAST):
        print(f"{options.model} {name}: {one['seconds'] * 1e3:.2f} ms, {one['share']:.0%} of what the machine can do")
    if torch.cuda.is_available() and options.model == "4b" and any(report[name]["share"] < least for name, least in LEAST.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
