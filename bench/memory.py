"""Peak memory of whole runs against the plan: `python -m bench.memory`, JSON out.

On a CUDA card: the 4b shape, the reference configuration at 512 + 512 tokens with 8 completions, under a hard limit of 14.7 GiB, in
bfloat16 and in rescaled float16. Without one: the 270m shape at small size, float32. Random weights of the exact shape; prompts of the
full length, completions that never stop. Each run is a process of its own, so that one's memory is not another's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import commit, machine, versions
from bench.random_checkpoint import write_checkpoint

GIB = 2**30
REFERENCE: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 8, "num_generations": 8, "planning_steps": 2}
LARGE = {
    **REFERENCE,
    **{"max_prompt_length": 512, "max_completion_length": 512, "evaluation.num_prompts": 16},
    **{"reward_model.max_pairs": 32, "reward_model.max_length": 1024},
}
SMALL = {
    **REFERENCE,
    **{"gradient_accumulation_steps": 2, "num_generations": 4, "max_prompt_length": 128, "max_completion_length": 32},
    **{"reward_model.max_pairs": 16, "reward_model.max_length": 256, "evaluation.num_prompts": 4},
}
TEMPLATE_TOKENS = 24
"""What the turns around a prompt take; a filler tokenizer's letters are one token each."""
JUDGE_TOKENS = 90
"""What the judge's question takes, letter by letter."""


def rows(count: int, prompt_length: int, dialogue_length: int) -> list[dict[str, str]]:
    """Preference pairs whose prompts, and whose dialogues with the judge's question, nearly fill their limits."""
    reply = max(8, dialogue_length - prompt_length - JUDGE_TOKENS)
    question = ("why is the sky blue and the grass green " * 64)[: prompt_length - TEMPLATE_TOKENS]
    talk = [f"\n\nHuman: {index:03d}{question[3:]}\n\nAssistant:" for index in range(count)]
    return [{"chosen": f"{text} {'x' * (reply - 4)}", "rejected": f"{text} {'y' * (reply // 2)}"} for text in talk]


def limit_memory(limit_gib: float | None) -> None:
    """The allocator refuses what a smaller card would not have, context aside; on a CPU nothing is limited."""
    if limit_gib is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / torch.cuda.get_device_properties(0).total_memory)


def run_once(size: str, precision: str, limit_gib: float | None, checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One training of two steps in this process; what was planned and what was held."""
    from gemma_grpo import GRPOTrainer

    on_cuda = torch.cuda.is_available()
    started = time.perf_counter()
    limit = {} if limit_gib is None else {"memory.limit_gib": limit_gib}
    limit_memory(limit_gib)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model_name=str(checkpoint),
            dataset=rows(80, settings["max_prompt_length"], settings["reward_model.max_length"]),
            output_dir=f"{folder}/run",
            max_steps=2,
            precision=precision,
            **{**settings, **limit},
        )
        trainer.train()
        metrics = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plan = trainer.plan()
    if on_cuda:
        context = plan.peak.parts["program, context"]
        held = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        measured = held["reserved"] + context
    else:
        import resource

        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = {"resident": measured}
    return {
        "size": size,
        "precision": precision,
        "limit_gib": limit_gib,
        "settings": settings,
        "planned": {**plan.to_dict(), "model": f"random weights of {size}'s shape"},  # not where they lay on this machine
        "held": held,
        "ratio_measured_to_planned": measured / plan.peak.total,
        "oom_retries": metrics[-1]["oom_retries"],
        "sampling_gap": [line["sampling_gap"] for line in metrics],
        "grad_norm": [line["grad_norm"] for line in metrics],
        "precision_probe": trainer.precision,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Every precision in a process of its own; prints a line each, and writes --out."""
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4b" if on_cuda else "270m")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp16_rescaled"] if on_cuda else ["fp32"])
    parser.add_argument("--limit-gib", type=float, default=14.7 if on_cuda else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="of that size; written to a temporary folder when not given")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        settings = LARGE if on_cuda else SMALL
        result = run_once(arguments.size, arguments.precision[0], arguments.limit_gib, arguments.checkpoint, settings)
        Path(arguments.child).write_text(json.dumps(result), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or write_checkpoint(arguments.size, Path(folder) / arguments.size)
        runs = [_child(arguments, precision, checkpoint, Path(folder)) for precision in arguments.precision]
    report = {"machine": machine(), "commit": commit(), "versions": versions(), "runs": runs}
    for run in runs:
        if "error" not in run:
            planned = run["planned"]["peak"]
            print(
                f"{run['size']} {run['precision']}: planned {planned['bytes'] / GIB:.2f} GiB in {planned['phase']}, measured "
                f"{run['ratio_measured_to_planned'] * planned['bytes'] / GIB:.2f} GiB, ratio {run['ratio_measured_to_planned']:.3f}, "
                f"{run['oom_retries']:.0f} out-of-memory retries, {run['seconds']:.0f} s"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _child(arguments: argparse.Namespace, precision: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    out = folder / f"{precision}.json"
    command = [sys.executable, "-m", "bench.memory", "--size", arguments.size, "--precision", precision]
    command += ["--checkpoint", str(checkpoint), "--child", str(out)]
    if arguments.limit_gib is not None:
        command += ["--limit-gib", str(arguments.limit_gib)]
    code = subprocess.run(command, check=False).returncode
    if code:
        print(f"{precision}: the run ended with exit code {code}")
        return {"size": arguments.size, "precision": precision, "error": f"exit code {code}"}
    return dict(json.loads(out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
