"""What a second rank brings, and what it costs the network: `python -m bench.ranks`, JSON out.

Speed: the same steps by one rank on one core, and by two ranks on two, in turns; completion tokens a second of a step's own time. On the
8m shape with random weights and 256 completions a step, which is arithmetic; and on the miniature, with 64 short ones, whose passes are so
small that starting them takes much of the time. `--shape 270m` shows a third limit: a gigabyte of weights read through one memory by both.
Traffic: bytes over the loopback interface for each step of two ranks, with a small and a large adapter: their difference is the gradient's,
since all else that is exchanged (completions, log-probabilities, words) is the same. A ring sends 2 (n - 1) times a gradient in all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bench.machine import commit, machine, versions
from bench.random_checkpoint import SMALLEST, write_checkpoint

RESULTS = Path(__file__).resolve().parent / "results" / "ranks.json"
SETTINGS = (
    *("miniature", "witness.every=0", "evaluation.num_prompts=0", "save_steps=0", "advantage.no_signal_steps=0", "reward={judge: 1.0}"),
    *("judge.least_accuracy=0", "epochs=100", "kl.hard_stop_steps=0"),
)
RANDOM_WEIGHTS = ("gradient_checkpointing=false", "precision=fp32", "learning_rate=1e-9")
"""So small a rate that both sample the same tokens: what random weights say is a matter of rounding after a few steps, the work is not."""
MANY_ROWS = ("batch_size=32", "gradient_accumulation_steps=1", "num_generations=8", "max_prompt_length=64", "max_completion_length=32")
FEW_ROWS = ("batch_size=8", "gradient_accumulation_steps=1", "num_generations=4", "max_prompt_length=48", "max_completion_length=16")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SMALL, LARGE = 8, 256
"""LoRA ranks."""


def run(folder: Path, ranks: int, steps: int, *settings: str) -> int:
    """Train on `ranks` cores; bytes that went over loopback meanwhile."""
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    words = [sys.executable, "-m", "gemma_grpo.cli", "train", *SETTINGS, f"max_steps={steps}", f"gpus={ranks}", f"output_dir={folder}"]
    before = loopback()
    with folder.with_suffix(".log").open("wb") as log:
        subprocess.run(
            [*words, *settings],
            check=True,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    return loopback() - before


def loopback() -> int:
    """Bytes this machine has sent to itself."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(line.split(":")[1].split()[8] for line in lines if line.strip().startswith("lo:")))


def tokens_a_second(folder: Path) -> float:
    """Over all steps but the first, which warms up."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [sum(event["seconds"].values()) for event in events if event["kind"] == "step_time"]
    return float((metrics[-1]["num_tokens"] - metrics[0]["num_tokens"]) / sum(seconds[1:]))


def speed(root: Path, pairs: int, steps: int, *settings: str) -> dict[str, Any]:
    """Ratios of the pairs, each of which sampled and learned from the same tokens."""
    ratios, found, identical = list[float](), {1: list[float](), 2: list[float]()}, True
    for pair in range(pairs):
        for ranks in (1, 2):
            folder = root / f"speed-{pair}-{ranks}"
            shutil.rmtree(folder, ignore_errors=True)
            run(folder, ranks, steps, f"seed={pair}", *settings)
            found[ranks].append(tokens_a_second(folder))
        one, two = ((root / f"speed-{pair}-{ranks}" / "samples.jsonl").read_text(encoding="utf-8").splitlines() for ranks in (1, 2))
        same = [json.loads(line)["completions"][0]["text"] for line in one] == [json.loads(line)["completions"][0]["text"] for line in two]
        identical &= same
        ratios.append(found[2][-1] / found[1][-1])
        print(f"pair {pair}: {found[1][-1]:.0f} and {found[2][-1]:.0f} tokens/s, x {ratios[-1]:.2f}; same completions: {same}", flush=True)
    return {
        "tokens_per_second": {str(ranks): values for ranks, values in found.items()},
        "ratios": ratios,
        "median": statistics.median(ratios),
        "same_completions": identical,
    }


def traffic(root: Path, steps: int) -> dict[str, Any]:
    """Bytes of a step and of its gradients."""
    sent, size = {}, {}
    for r in (SMALL, LARGE):
        folders = [root / f"traffic-{r}-{count}" for count in (1, steps + 1)]
        longer, shorter = (run(folder, 2, count, f"lora.r={r}") for folder, count in zip(folders[::-1], (steps + 1, 1), strict=True))
        sent[r] = (longer - shorter) / steps  # what starting and ending exchange is in both
        weights = load_file(folders[1] / "adapter" / "adapter_model.safetensors")
        size[r] = 4 * sum(weight.numel() for weight in weights.values())
    passes = 2
    factor = (sent[LARGE] - sent[SMALL]) / (size[LARGE] - size[SMALL]) / passes
    return {
        "adapter_bytes": size,
        "bytes_per_step": sent,
        "planning_passes": passes,
        "gradient_sent_times": factor,
        "ring": 2.0,
        "rest_bytes_per_step": sent[SMALL] - passes * 2 * size[SMALL],
    }


def main() -> None:
    """Measure both, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="on the miniature; half as many on the shape")
    parser.add_argument("--shape", default="8m", help="of the random weights: 8m, 270m, 1b")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        model = f"model_name={write_checkpoint(options.shape, place / 'checkpoint')}"
        rows = MANY_ROWS if options.shape == SMALLEST.name else FEW_ROWS
        found = {
            "traffic": traffic(place, 4),
            "speed": {
                options.shape: speed(place, options.pairs, options.steps // 2, model, *RANDOM_WEIGHTS, *rows),
                "miniature": speed(place, options.pairs, options.steps),
            },
        }
    options.out.write_text(json.dumps({"machine": machine(), "versions": versions(), "commit": commit(), **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
