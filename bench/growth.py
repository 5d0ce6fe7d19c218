"""How our step's cost grows: `python -m bench.growth`, JSON and SVG out; exit code 1 when a law does not hold.

Completions per prompt 2 to 32, prompts of 64 to 1024 tokens, completions of 32 to 512, one long completion among short ones, and the
log-probabilities' memory over the number of tokens. On the 8m shape, float32; ours alone, each point the median of a few steps.
"""

from __future__ import annotations

import argparse
import ctypes
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
from bench.protocol import PeakMemory
from bench.random_checkpoint import SMALLEST, write_checkpoint
from bench.step import RESULTS
from bench.workload import Setting, StepLengths, draw_steps
from gemma_grpo.grpo.step import policy_batch, sampling_params
from gemma_grpo.model.logprobs import token_logprobs

GROUPS = (2, 4, 8, 16, 32)
PROMPTS = (64, 128, 256, 512, 1024)
COMPLETIONS = (32, 64, 128, 256, 512)
LONGEST = (48, 128, 256, 512)
"""Of one completion in a group, the group's tokens staying the same: 16 completions of 48."""
TOKENS = (2048, 4096, 8192, 16_384)
NUM_PROMPTS, GROUP = 2, 8
STEPS = 3
"""Measured at each point, after one that is not."""


def base_setting(threads: int) -> Setting:
    """What every point starts from; the limits are those of the point's own lengths."""
    return Setting(SMALLEST.name, "b", NUM_PROMPTS, GROUP, NUM_PROMPTS, 1024, 512, threads=threads)


def uniform(setting: Setting, prompt: int, completions: Sequence[int]) -> list[StepLengths]:
    """Steps whose prompts are of one length, with the same completions for each."""
    return [StepLengths((prompt,) * setting.num_prompts, tuple(completions) * setting.num_prompts)] * (STEPS + 1)


def one_long(longest: int, *, tokens: int, group: int) -> list[int]:
    """A group's lengths: one as long as told, the others sharing the rest evenly."""
    rest, others = tokens - longest, group - 1
    return [longest, *(rest // others + (index < rest % others) for index in range(others))]


def real_lengths(setting: Setting, group: int) -> list[StepLengths]:
    """The same prompts whatever the group's size, and the first completions of the largest group's."""
    size = GROUPS[-1]
    steps = draw_steps(replace(setting, num_generations=size, max_completion_length=256), STEPS + 1)
    return [StepLengths(step.prompts, _first_of_each(step.completions, size, group)) for step in steps]


def _first_of_each(completions: Sequence[int], size: int, group: int) -> tuple[int, ...]:
    return tuple(length for index, length in enumerate(completions) if index % size < group)


def point(setting: Setting, folder: Path, steps: Sequence[StepLengths]) -> dict[str, Any]:
    """Seconds by phase, memory and forward tokens of a step of these lengths."""
    longest = max(max(step.completions) for step in steps)
    setting = replace(setting, max_prompt_length=max(max(step.prompts) for step in steps), max_completion_length=longest)
    side = OwnSide(setting, str(folder), folder / "adapter", steps)
    memory = PeakMemory("cpu")
    tokens = _forward_tokens(side)
    answers = []
    for index in range(1, len(steps)):
        memory.reset()
        answers.append({**side.step(index), "peak_bytes": memory.above_base()})
    return {
        "seconds": median(answer["seconds"] for answer in answers),
        "phases": {name: median(answer["phases"][name] for answer in answers) for name in answers[0]["phases"]},
        "peak_bytes": median(answer["peak_bytes"] for answer in answers),
        "forward_tokens": tokens,
        "real_tokens": sum(steps[0].prompts) + sum(steps[0].completions),
    }


def _forward_tokens(side: OwnSide) -> dict[str, int]:
    """Tokens that enter the model in the reference pass, and in each planning step of the update: counted at the embedding."""
    seen = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal seen
        seen += output.shape[:-1].numel()

    def counted(work: Callable[[], Any]) -> tuple[Any, int]:
        before = seen
        return work(), seen - before

    side.prepare(0)
    stepper, config = side.stepper, side.config
    groups = stepper.engine.sample(side.prompts[0], sampling_params(config, 0))
    scores = stepper.rewards.score(groups)
    handle = side.model.causal_lm.get_input_embeddings().register_forward_hook(count)
    batch, reference = counted(lambda: policy_batch(side.model, groups, scores, stepper.rewards.weights, config, config.kl.beta))
    _, update = counted(lambda: stepper.updater.update(batch, 0))
    handle.remove()
    return {"reference": reference, "planning_step": update // config.planning_steps}


def logprob_bytes(tokens: int) -> int:
    """Peak memory of log-probabilities and their gradient, above the hidden states they are made of."""
    hidden = torch.randn(tokens, SMALLEST.hidden_size, requires_grad=True)
    head = torch.randn(SMALLEST.vocab_size, SMALLEST.hidden_size) * 0.02
    targets = torch.randint(SMALLEST.vocab_size, (tokens,))
    ctypes.CDLL(None).malloc_trim(0)
    memory = PeakMemory("cpu")
    memory.reset()
    logprobs, _ = token_logprobs(hidden, head, targets)
    logprobs.sum().backward()
    return memory.above_base()


def law(text: str, value: float, limit: float) -> dict[str, Any]:
    """A law with what was measured and the most it may be."""
    return {"law": text, "value": value, "limit": limit, "holds": value <= limit}


def laws(curves: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold of the curves."""
    points = [entry for curve in ("group", "prompt", "completion", "longest") for entry in curves[curve].values()]
    shares = [count / entry["real_tokens"] for entry in points for count in entry["forward_tokens"].values()]
    groups, longest, memory = curves["group"], list(curves["longest"].values()), curves["logprob_bytes"]
    learning = [entry["phases"]["reference"] + entry["phases"]["update"] for entry in longest]
    held = [entry["peak_bytes"] for entry in longest]
    per_token = (memory[TOKENS[-1]] - memory[TOKENS[0]]) / (TOKENS[-1] - TOKENS[0])
    return [
        law("forward tokens / (prompts + completions), reference pass and each planning step", max(shares), 1.0),
        law("the same, the other way round: no token left out", 1 / min(shares), 1.0),
        law("step time at 16 completions / at 4, real lengths", groups[16]["seconds"] / groups[4]["seconds"], 3.2),
        law("reference and update time, longest completion 512 / 48, same tokens", learning[-1] / learning[0], 1.3),
        law("peak memory, longest completion 512 / 48, same tokens", held[-1] / held[0], 1.3),
        law("log-probabilities: bytes of a further token / bytes of its logits", per_token / (4 * SMALLEST.vocab_size), 0.15),
    ]


def measure(threads: int) -> dict[str, Any]:
    """Every curve, and the laws."""
    torch.set_num_threads(threads)
    setting = base_setting(threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(SMALLEST.name, Path(temporary))

        def timed(name: str, value: int, setting: Setting, steps: Sequence[StepLengths]) -> dict[str, Any]:
            measured = point(setting, folder, steps)
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in measured["phases"].items())
            print(f"  {name} {value}: {measured['seconds']:.2f} s ({phases}), {measured['peak_bytes'] / 2**20:.0f} MiB", flush=True)
            return measured

        wide = {group: replace(setting, num_generations=group) for group in GROUPS}
        sixteen = wide[16]
        curves: dict[str, Any] = {
            "group": {group: timed("G", group, one, real_lengths(one, group)) for group, one in wide.items()},
            "prompt": {length: timed("prompt", length, setting, uniform(setting, length, [45] * GROUP)) for length in PROMPTS},
            "completion": {length: timed("completion", length, setting, uniform(setting, 99, [length] * GROUP)) for length in COMPLETIONS},
            "longest": {
                longest: timed("longest", longest, sixteen, uniform(sixteen, 99, one_long(longest, tokens=16 * 48, group=16)))
                for longest in LONGEST
            },
        }
    logprob_bytes(TOKENS[0])  # the first call's buffers are no part of the measure
    curves["logprob_bytes"] = {tokens: logprob_bytes(tokens) for tokens in TOKENS}
    head = {"machine": {**machine(), "threads": threads}, "commit": commit(), "versions": versions(), "setting": setting.to_dict()}
    return {**head, "curves": curves, "laws": laws(curves)}


def draw(report: dict[str, Any]) -> str:
    """Step time over what grows, as one SVG."""
    from bench.chart import lines

    curves = {name: {int(key): value for key, value in curve.items()} for name, curve in report["curves"].items()}
    panels = {
        "completions per prompt": {name: _series(curves["group"], name) for name in ("rollout", "update")},
        "prompt tokens": {name: _series(curves["prompt"], name) for name in ("rollout", "update")},
        "completion tokens": {name: _series(curves["completion"], name) for name in ("rollout", "update")},
        "longest of 16, same tokens": {name: _series(curves["longest"], name) for name in ("rollout", "update")},
    }
    return lines(panels, "seconds")


def _series(curve: dict[int, Any], phase: str) -> list[tuple[float, float]]:
    return [(key, entry["phases"][phase]) for key, entry in curve.items()]


def main() -> None:
    """Measure unless the result is there, draw, and say which laws hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--again", action="store_true", help="measure although the result file is there")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.again or not options.out.exists():
        print("growth: about 5 min on two cores", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(measure(options.threads), indent=1) + "\n", encoding="utf-8")
    report = json.loads(options.out.read_text(encoding="utf-8"))
    options.out.with_suffix(".svg").write_text(draw(report), encoding="utf-8")
    for one in report["laws"]:
        print(f"growth: {'holds' if one['holds'] else 'BROKEN'}: {one['law']}: {one['value']:.2f}, at most {one['limit']}")
    if not all(one["holds"] for one in report["laws"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
