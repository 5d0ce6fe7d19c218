"""A whole training step beside TRL's: `python -m bench.step --model 8m --workload a`, JSON out.

Two processes, ours and TRL's in its own environment (`make .venv-peer/.installed`), load the same folder, start from the same adapter
and run the same prompts with completions forced to the same lengths. They take turns, one computing while the other waits, in an order
that alternates from pair to pair; the first pair is a warm-up and is not counted. Before that, loss and LoRA gradient of the two
are compared on the same completions. bench/workload.py says what is drawn, the workers what is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from bench.comparison import compare
from bench.machine import commit, machine
from bench.protocol import MIB, Worker
from bench.workload import LIMITS, MAX_PROMPT, WORKLOADS, Setting, StepLengths, draw_steps

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"
AGREEMENT = {"fp32": 1e-4, "bf16": 0.1}
"""Largest relative difference of loss and gradient that is rounding."""
MODELS = {"8m": (4, 2, "fp32"), "270m": (2, 2, "fp32"), "4b": (4, 2, "bf16")}
"""Prompts of a step and of a micro-batch, and the precision; every prompt has 8 completions. A micro-batch is the reference recipe's."""
FEWER = {("270m", "b"): 1}
"""Prompts of a step, and of its one micro-batch, where a step of TRL's would take seven minutes on two cores."""
PAIR_SECONDS = {("8m", "a"): 45, ("8m", "b"): 55, ("8m", "c"): 90, ("270m", "a"): 270, ("270m", "b"): 220}
"""About how long a pair takes on two cores, for the estimate that is printed."""


def setting_of(model: str, workload: str, threads: int) -> Setting:
    """The sizes a model is measured at."""
    num_prompts, batch_size, precision = MODELS[model]
    num_prompts = FEWER.get((model, workload), num_prompts)
    batch_size = min(batch_size, num_prompts)
    limits = (MAX_PROMPT[workload], LIMITS[workload])
    return Setting(model, workload, num_prompts, 8, batch_size, *limits, precision=precision, threads=threads)


def missing(model: str, peer_python: Path) -> str | None:
    """Why a model cannot be measured here; None when it can."""
    import torch

    if model == "4b" and not torch.cuda.is_available():
        return "the 4b shape is measured on a CUDA GPU, and there is none here"
    if not peer_python.exists():
        return f"TRL's environment is not there ({peer_python.name} of {peer_python.parent.parent.name}). Run `make bench`, which makes it"
    return None


def measure(setting: Setting, pairs: int, peer_python: Path, *, checkpoint: Path | None, trl: Mapping[str, Any]) -> dict[str, Any]:
    """Both sides over a warm-up and so many pairs of steps; `trl` goes into its GRPOConfig.

    Raises RuntimeError when a worker dies or the two do not agree.
    """
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        start: dict[str, Any] = {"setting": setting.to_dict(), "num_steps": pairs + 2, "adapter": str(folder / "adapter")}
        start |= {"folder": str(checkpoint or _written(setting.model, folder / "model")), "output_dir": str(folder / "output"), "trl": trl}
        load = os.getloadavg()[0]
        sides = {
            "ours": stack.enter_context(closing(Worker(sys.executable, "bench.own_worker", folder / "ours.log"))),
            "trl": stack.enter_context(closing(Worker(str(peer_python), "bench.trl_worker", folder / "trl.log"))),
        }
        loaded = {name: side.ask("load", **start) for name, side in sides.items()}  # ours first: it writes the adapter
        agreement = _agreement(sides, setting, pairs + 1, folder)
        steps = draw_steps(setting, pairs + 1)
        samples = _take_turns(sides, steps)
    return {
        "machine": {**machine(), "load_average_before": load, "threads": setting.threads},
        "commit": commit(),
        "versions": {name: answer["versions"] for name, answer in loaded.items()},
        "workload": WORKLOADS[setting.workload],
        "setting": setting.to_dict(),
        "trl_arguments": trl,
        "token_budget": loaded["ours"]["token_budget"],
        "agreement": agreement,
        "lengths": [{"prompts": step.prompts, "completions": step.completions} for step in steps],
        "loaded_bytes": {name: answer["base_bytes"] for name, answer in loaded.items()},
        "samples": samples,
        "summary": compare(*([pair[name] for pair in samples[1:]] for name in ("ours", "trl"))),
    }


def _written(model: str, folder: Path) -> Path:
    from bench.random_checkpoint import write_checkpoint

    return write_checkpoint(model, folder, text_only=True)


def _agreement(sides: dict[str, Worker], setting: Setting, index: int, folder: Path) -> dict[str, Any]:
    path = str(folder / "agreement.safetensors")
    own = sides["ours"].ask("agree", index=index, path=path)
    peer = sides["trl"].ask("agree", index=index, path=path)
    relative = peer["relative_difference"]
    print(f"  same completions: loss differs by {relative['loss']:.1e}, the adapter's gradient by {relative['gradient']:.1e}", flush=True)
    most = AGREEMENT[setting.precision]
    if max(relative.values()) > most:
        raise RuntimeError(f"the two sides do not compute the same: {relative}, more than {most}. Their times cannot be compared.")
    return {"loss": {"ours": own["loss"], "trl": peer["loss"]}, "relative_difference": relative}


def _take_turns(sides: dict[str, Worker], steps: Sequence[StepLengths]) -> list[dict[str, Any]]:
    """One step of each side at a time; whoever was first comes second in the next pair. The first pair is the warm-up."""
    samples: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        order = list(sides) if index % 2 else list(sides)[::-1]
        answers = {name: sides[name].ask("step", index=index) | {"tokens": sum(step.completions)} for name in order}
        samples.append({"first": order[0], **{name: answers[name] for name in sides}})
        shown = ", ".join(f"{name} {answers[name]['seconds']:.2f} s, {answers[name]['peak_bytes'] / MIB:.0f} MiB" for name in sides)
        wall, cpu = (answers["trl"][clock] / answers["ours"][clock] for clock in ("seconds", "cpu_seconds"))
        print(f"  {f'pair {index}' if index else 'warm-up'}: {shown}; {wall:.2f}x, of processor time {cpu:.2f}x", flush=True)
    return samples


def run(model: str, workload: str, pairs: int, **options: Any) -> Path | None:
    """Measure and write a result file unless it is there; its path, None where the model cannot be measured."""
    peer_python: Path = (options.get("peer_python") or PEER_PYTHON).absolute()  # not resolved: a venv's is a link
    out: Path = options.get("out") or RESULTS / f"step-{model}-{workload}.json"
    if out.exists() and not options.get("again"):
        print(f"{model} {workload}: {out.name} is there (--again measures anew)")
        return out
    reason = missing(model, peer_python)
    if reason:
        print(f"{model} {workload}: skipped: {reason}.")
        return None
    setting = setting_of(model, workload, options.get("threads") or os.cpu_count() or 1)
    estimate = PAIR_SECONDS.get((model, workload), 60) * (pairs + 2) / 60
    print(f"{model} {workload}: {WORKLOADS[workload]}; {pairs} pairs, about {estimate:.0f} min on two cores", flush=True)
    started = time.perf_counter()
    report = measure(setting, pairs, peer_python, checkpoint=options.get("checkpoint"), trl=options.get("trl") or {})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    ratio, memory = report["summary"]["paired_ratio"], report["summary"]["memory_ratio"]
    print(f"{model} {workload}: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}), memory {memory['median']:.1f}x", end="")
    print(f", {time.perf_counter() - started:.0f} s")
    return out


def main() -> None:
    """One model and workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8m")
    parser.add_argument("--workload", choices=WORKLOADS, default="a")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: bench/results/step-MODEL-WORKLOAD.json")
    parser.add_argument("--again", action="store_true", help="measure although the result file is there")
    parser.add_argument("--threads", type=int, help="of each side's arithmetic; default: all cores")
    parser.add_argument("--peer-python", type=Path, help="interpreter that has TRL; default: .venv-peer's")
    parser.add_argument("--checkpoint", type=Path, help="a folder of that size; a random one is written when not given")
    parser.add_argument("--trl", type=json.loads, help="further arguments of TRL's GRPOConfig, a JSON object, to try what suits it")
    options = vars(parser.parse_args())
    if run(options.pop("model"), options.pop("workload"), options.pop("pairs"), **options) is None:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
