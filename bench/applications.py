"""Each application's recipe on the miniature for 20 updates: `python -m bench.applications` writes results/applications.json and a table.

One process each, one thread: the figures are rewards, not times. "Before" is the miniature without its adapter, "after" with it, on
prompts that training did not see; the interval is the evaluation's own, over whole conversations. What they say: docs/applications.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.document import WrittenPart
from bench.machine import commit, machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "applications.json"
DOCUMENT = WrittenPart(
    ROOT / "docs" / "applications.md",
    "<!-- figures, written by python -m bench.applications -->\n",
    "<!-- figures: end -->\n",
)
APPLICATIONS = ("research-qa", "tutoring", "content", "conversation", "code")
MINIATURE = (
    *("model_name=miniature", "learning_rate=2.5e-3", "batch_size=8", "gradient_accumulation_steps=1", "epochs=100", "max_steps=20"),
    *("max_completion_length=40", "gradient_checkpointing=false", "kl.beta=0.1", "kl.ref_target=null", "reward_model.learning_rate=2e-3"),
    "lora.target_modules=[q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
)
"""What a tiny model needs in the place of a recipe's own settings: short replies, a rate for 1.7 M parameters, a leash of its own."""
MEASURED = (
    *("save_steps=0", "witness.every=0", "witness.look_alikes=0", "evaluation.num_prompts=64", "evaluation.num_completions=8"),
    "data.holdout=0.4",  # a set has some thirty prompts: of six held out an interval was as wide as 0.7
)

SAMPLES = 4
"""Replies before and after that are kept, to be read beside the figures."""


def train(name: str, words: Sequence[str]) -> dict[str, Any]:
    """One run from the command line; what its evaluation says of the reward it was trained on."""
    made_by = commit()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        settings = {word.partition("=")[0]: word for word in (*MINIATURE, *MEASURED, *words)}
        given = [name, *settings.values(), f"output_dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([sys.executable, "-m", "gemma_grpo.cli", "train", *given], check=True, env=environment, cwd=temporary)
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    kept = {metric: evaluation[metric] for metric in ("reward", "length", "kl")}
    kept |= {"samples": evaluation["samples"][:SAMPLES]}
    return {"commit": made_by, "steps": info["steps"], "conversations": evaluation["conversations"], **kept}


def table(results: Mapping[str, Any]) -> str:
    """One row for each application."""
    heads = ("recipe", "reward before", "after", "gain, 95 % interval", "replies, prompts", "tokens a reply", "KL, nat a token")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, one in results["applications"].items():
        reward, length, kl = one["reward"], one["length"], one["kl"]
        low, high = reward["interval"]
        rows.append(
            f"| `{name}` | {reward['before']:.3f} | {reward['after']:.3f} | {reward['gain']:+.3f} ({low:+.3f} to {high:+.3f}) "
            f"| {reward['n']}, {one['conversations']} | {length['before']:.1f} to {length['after']:.1f} | {kl['after']:.2f} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=APPLICATIONS, choices=APPLICATIONS)
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE", help="settings on top, to try; nothing is written then")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"applications": {}}
    for name in options.only:
        found = train(name, options.set)
        results["applications"][name] = found
        if not options.set:
            results |= {"settings": [*MINIATURE, *MEASURED], "machine": machine(), "versions": versions()}
            results["applications"] = {one: results["applications"][one] for one in APPLICATIONS if one in results["applications"]}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if not options.set:
        DOCUMENT.write(table(results))


if __name__ == "__main__":
    main()
