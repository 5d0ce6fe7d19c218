"""Over-optimisation on the miniature, whose truth is known: `python -m bench.wind_tunnel`, JSON out.

Each run trains a policy with some settings and one seed, and looks at it every few steps: the reward it is trained on, the witness, and
gold, on the same held-out prompts. The judges of a seed are trained once and shared by its variants. Runs are processes of one thread;
a run whose line is in the result already is not made again, so a long series can be broken off.

What comes out of it: bench/results/wind_tunnel.json, and the tables of docs/overoptimisation.md (`python -m bench.wind_tunnel_tables`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from bench.machine import commit, machine, versions
from gemma_grpo.monitor.alarms import new_alarms

RESULTS = Path(__file__).parent / "results" / "wind_tunnel.json"
ARMS = ("defaults", "length only", "random")
"""Variants that are evaluated at the end too, to stand beside best-of-n, DPO and SFT."""
NUMBERS = ("gold", "witness", "reward", "win_rate", "win_rate_chosen", "kl_sequence", "length")
TOLD = ("level", "step", "witness", "text")
"""What is kept of an alarm."""
WATCHED: dict[str, Any] = {"witness.every": 4, "witness.num_prompts": 1000, "witness.num_completions": 2, "evaluation.num_prompts": 0}
"""All held-out prompts, two replies each: the curves' own noise must not be taken for what happens."""
CLOSELY = ("nothing", "defaults", "group std")
"""Variants that are looked at after every step: those whose alarms are counted, and most false ones."""
BARE: dict[str, Any] = {"kl.placement": "off", "reward_model.shaping": "none", "reward": "{generative: 1.0}"}
JUDGES = ("dataset", "reward_model.members")
"""Settings that a variant's judges depend on."""
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "nothing": BARE,
    "group std": {"advantage.scale": "group"},
    "PAR off": {"reward_model.shaping": "none"},
    "KL off": {"kl.placement": "off"},
    "KL in the reward": {"kl.placement": "reward", "kl.beta": 0.08},
    "three judges, UWO": {"reward_model.members": 3},
    "three judges, worst": {"reward_model.members": 3, "reward_model.combine": "worst"},
    "length taken out": {"reward_model.length_residual": "true"},
    "nothing but three judges": {**BARE, "reward_model.members": 3},
    "nothing but PAR": {**BARE, "reward_model.shaping": "par"},
    "nothing but KL": {**BARE, "kl.placement": "loss"},
    "labels 0 % wrong": {"dataset": "miniature@0"},
    "labels 40 % wrong": {"dataset": "miniature@0.4"},
    "length only": {"reward": "{length: 1.0}"},
    "random": {"reward": "{random: 1.0}"},
}


def gemma_grpo(words: Sequence[str], log: Path) -> None:
    """One command line of the package, with one thread. Raises RuntimeError with the end of what it said when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "gemma_grpo.cli", *words], stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code:
        raise RuntimeError(f"gemma-grpo {' '.join(words)} ended with {code}:\n{log.read_text(encoding='utf-8')[-2000:]}")


def settings(variant: str, seed: int) -> dict[str, Any]:
    """Everything in which a run differs from the recipe."""
    evaluated = {"evaluation.num_prompts": 200, "evaluation.num_completions": 4} if variant in ARMS else {}
    closely = {"witness.every": 1} if variant in CLOSELY else {}
    return {"seed": seed, **WATCHED, **closely, **evaluated, **VARIANTS[variant]}


def words(values: Mapping[str, Any]) -> list[str]:
    """key=value."""
    return [f"{name}={value}" for name, value in values.items()]


def train_judges(variant: str, seed: int, root: Path) -> Path:
    """The reward adapters and the witness that a variant needs; trained once for all variants that share them."""
    shared = {name: value for name, value in VARIANTS[variant].items() if name in JUDGES or name == "reward_model.length_residual"}
    folder = root / "-".join(["judges", str(seed), *(str(value).replace("@", "_") for value in shared.values())])
    if not (folder / "reward" / "calibration.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        gemma_grpo(["train-reward", "miniature", *words({"seed": seed, **shared, "output_dir": folder})], root / f"{folder.name}.log")
    return folder


def run(variant: str, seed: int, steps: int, root: Path, *, baselines: bool) -> dict[str, Any]:
    """One policy, and what the looks at it saw."""
    made_by = commit()
    folder = run_folder(root, variant, seed)
    judges = train_judges(variant, seed, root)
    given = {"reward_model.path": judges / "reward", "max_steps": steps, "output_dir": folder}
    shutil.rmtree(folder, ignore_errors=True)
    gemma_grpo(["train", "miniature", *words({**settings(variant, seed), **given})], root / f"{folder.name}.log")
    if variant == "defaults" and baselines:
        gemma_grpo(["evaluate", str(folder), "--baselines"], root / f"{folder.name}-baselines.log")
    looks = [json.loads(line) for line in (folder / "witnesses.jsonl").read_text(encoding="utf-8").splitlines()]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) if variant in ARMS else {}
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "commit": made_by,
        "settings": settings(variant, seed),
        "looks": [{"step": look["step"], **look["metrics"]} for look in looks],
        "alarms": [{name: event[name] for name in TOLD} for event in events if event["kind"] == "alarm"],
        "evaluation": {name: evaluated[name] for name in NUMBERS if name in evaluated},
        "baselines": evaluated.get("baselines", {}),
    }


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--baselines", action="store_true", help="with the defaults: best-of-n, DPO and SFT too, three minutes a seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=None, help="where the runs are kept; default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rejudge", action="store_true", help="make no run: judge those kept in --work by the alarms as they are now")
    options = parser.parse_args()
    if options.rejudge:
        rejudge(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        make_missing(options, options.work or Path(temporary))


def rejudge(options: argparse.Namespace) -> None:
    """The alarms of the result's runs, from their looks' replies; for limits that were set anew. Runs that are not in --work stay."""
    result = json.loads(options.out.read_text(encoding="utf-8"))
    for one in result["runs"]:
        log = run_folder(options.work, one["variant"], one["seed"]) / "witnesses.jsonl"
        if one["variant"] in options.variants and one["seed"] in options.seeds and log.is_file():
            looks = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            one["alarms"] = alarms_of(looks)
            print(f"{one['variant']}, seed {one['seed']}: {', '.join(str(alarm['step']) for alarm in one['alarms'])}")
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def alarms_of(looks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the rules of alarms.py say of each look, beside those before it."""
    judged: list[dict[str, Any]] = []
    for look in looks:
        judged.append({**look, "alarms": [alarm.to_dict() for alarm in new_alarms(judged, look)]})
    return [{name: alarm[name] for name in TOLD} for look in judged for alarm in look["alarms"]]


def run_folder(root: Path, variant: str, seed: int) -> Path:
    """Where a run is kept."""
    return root / f"{variant.replace(' ', '-').replace('%', 'percent').replace(',', '')}-{seed}"


def make_missing(options: argparse.Namespace, root: Path) -> None:
    """The runs that the result does not have, one variant after the other; the result is written after each."""
    root.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.is_file() else []
    done = [(one["variant"], one["seed"], one["steps"], one["settings"]) for one in runs]
    wanted = [(variant, seed) for variant in options.variants for seed in options.seeds]
    of_seed = {seed: Lock() for seed in options.seeds}  # its judges are trained once

    def make(variant: str, seed: int) -> None:
        with of_seed[seed]:
            one = run(variant, seed, options.steps, root, baselines=options.baselines)
        last = "  ".join(f"{name} {value:.3f}" for name, value in one["looks"][-1].items())
        with writing:
            runs.append(one)
            runs.sort(key=lambda one: (list(VARIANTS).index(one["variant"]), one["seed"], one["steps"]))
            head = {"machine": machine(), "versions": versions()}
            options.out.write_text(json.dumps({**head, "runs": runs}, indent=1) + "\n", encoding="utf-8")
        print(f"{variant}, seed {seed}: {last}", flush=True)

    writing = Lock()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda one: make(*one), [one for one in wanted if (*one, options.steps, settings(*one)) not in done]))


if __name__ == "__main__":
    main()
