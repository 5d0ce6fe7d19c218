"""Checkpoints of released shapes, random weights, trained from the command line on real hh-rlhf rows: the peak is what was planned."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(os.environ.get("HH_RLHF_DIR", ROOT / "../shared/data/hh-rlhf")) / "harmless-base.dev.jsonl.gz"
TOLERANCE = 0.10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROWS.is_file(), reason="the hh-rlhf rows are not on this machine (HH_RLHF_DIR)"),
]

# what each size can do in minutes on two cores; a real row is read by a filler tokenizer, a letter a token
SETTINGS = {
    "270m": ["batch_size=2", "gradient_accumulation_steps=2", "max_prompt_length=256", "max_completion_length=32"],
    "1b": ["batch_size=1", "gradient_accumulation_steps=2", "max_prompt_length=96", "max_completion_length=24"],
}
COMMON = [
    *("max_steps=2", "num_generations=4", "reward_model.batch_size=4", "reward_model.max_length=192"),
    *("evaluation.num_prompts=1", "data.holdout=0.2"),
]


def gemma_grpo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gemma_grpo.cli", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("size", SETTINGS)
def test_a_real_size_trains_and_holds_what_was_planned(size: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "bench.random_checkpoint", size, str(tmp_path / size)], cwd=ROOT, check=True)
    with gzip.open(ROWS, "rt", encoding="utf-8") as file:
        shortest = sorted(file, key=len)[:12]
    (tmp_path / "rows.jsonl").write_text("".join(shortest), encoding="utf-8")
    run_dir = tmp_path / "run"
    words = [f"gemma3-{size}", f"model_name={tmp_path / size}", f"dataset={tmp_path / 'rows.jsonl'}", f"output_dir={run_dir}"]
    words += [*SETTINGS[size], *COMMON]
    plan = json.loads(gemma_grpo("plan", *words, "--json").stdout)
    peak = peak_of("train", *words)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["grad_norm"] > 0 and line["passes"] == 2 and line["oom_retries"] == 0 for line in metrics)
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    planned = plan["peak"]["bytes"]
    print(f"{size}: planned {planned / 2**30:.2f} GiB, measured {peak / 2**30:.2f} GiB, ratio {peak / planned:.3f}")
    assert peak == pytest.approx(planned, rel=TOLERANCE)


CHILD = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "gemma_grpo.cli", *sys.argv[1:]], capture_output=True, text=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.stderr if done.returncode else 0)
"""


def peak_of(*words: str) -> int:
    """Largest resident size of one command, measured by a parent that has no other children."""
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
    return int(done.stdout)
