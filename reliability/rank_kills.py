"""Kill and freeze ranks at random moments: `python -m reliability.rank_kills --kills 20 --freezes 10`, JSON out.

One run on two ranks is never disturbed. In each of the others one rank is killed (SIGKILL) or frozen (SIGSTOP) once; torchrun's agent
starts all ranks again, and they go on from the last checkpoint. Counted are the seconds until no rank of that start but the frozen one is
left, whether logs and adapter are those of the first run, byte for byte, and processes that are left at the end.
Exit code 1 where a run fails or differs, a process is left, or the others noticed later than they should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.machine import commit, machine, versions
from gemma_grpo.distributed import GRACE, STARTING
from reliability.trainer_kills import rows
from reliability.writer_kills import RESULTS

TIMEOUT = 6.0
"""Of a rank that does not answer, seconds."""
AT_START, LOADING = "frozen at the start", 15.0
"""A moment, and the seconds in which the other rank may still load its libraries then, before it begins to wait."""
BOUND = {"killed": GRACE + 3, "frozen": 2 * TIMEOUT + GRACE + 3, AT_START: STARTING + LOADING + GRACE + 3}
"""Seconds in which the others must have ended; three to end a process in. Others wait twice as long for rank 0, which may itself wait;
and before they have come together, as long as ranks are given to load their libraries in."""
SPAN = 0.75
"""Of a whole run's time, from its ranks' start on: when a rank may be disturbed."""
COMPARED = ("metrics.jsonl", "samples.jsonl", "witnesses.jsonl", "adapter/adapter_model.safetensors")
STEPS = 16
SETTINGS = (
    *("miniature", "reward={length: 1.0, repetition: 1.0}", "batch_size=2", "gradient_accumulation_steps=2", "num_generations=3"),
    *("max_completion_length=12", f"max_steps={STEPS}", "epochs=16", "save_steps=3", "witness.every=4", "witness.num_prompts=3", "gpus=2"),
    *("evaluation.num_prompts=3", "advantage.no_signal_steps=0", "ranks.max_restarts=1", f"ranks.timeout_seconds={TIMEOUT:g}"),
    "ranks.grace_seconds=4",
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(folder: Path, data: Path) -> subprocess.Popen[bytes]:
    """A run on two ranks, in a folder."""
    words = [sys.executable, "-m", "gemma_grpo.cli", "train", *SETTINGS, f"dataset={data}", f"output_dir={folder}"]
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log)


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process, of those that the launcher has started and that are alive."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").glob("*/children"):
        for child in _text(task).split():
            variables = _text(Path(f"/proc/{child}/environ")).split("\0")
            number = next((one.removeprefix("RANK=") for one in variables if one.startswith("RANK=")), None)
            if number is not None and alive(int(child)):
                found[int(number)] = int(child)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def alive(process: int) -> bool:
    """Whether it still runs: it is there, and no zombie."""
    state = _text(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


def seconds_until(holds: Callable[[], bool], most: float) -> float:
    """How long it took; RuntimeError where it took longer than `most`."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > most:
            raise RuntimeError(f"it did not happen in {most:g} s")
        time.sleep(0.02)
    return time.monotonic() - began


def disturbed(folder: Path, data: Path, how: str, after: float, number: int) -> dict[str, Any]:
    """A run of which rank `number` is killed or frozen so many seconds after both ranks are there."""
    launcher = start(folder, data)
    seconds_until(lambda: len(ranks_of(launcher.pid)) == 2 or launcher.poll() is not None, 60)
    time.sleep(after)
    ranks = ranks_of(launcher.pid)
    steps = _text(folder / "metrics.jsonl").count("\n")
    if len(ranks) < 2 or (how == "frozen" and steps == STEPS):  # at the end rank 0 is alone: there is nobody to notice
        launcher.wait(600)
        return {"how": "over before", "code": launcher.returncode}
    if how == "frozen" and '"kind": "start"' not in _text(folder / "events.jsonl"):
        how = AT_START
    os.kill(ranks[number], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    noticed = seconds_until(lambda: not any(alive(one) for other, one in ranks.items() if other != number), 300)
    launcher.wait(600)
    return {"how": how, "rank": number, "after_steps": steps, "noticed_seconds": noticed, "code": launcher.returncode}


def left_over(root: Path) -> int:
    """Processes that still work on runs in a folder."""
    lines = (_text(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    return sum(f"output_dir={root}" in line for line in lines)


def contents(folder: Path) -> list[bytes]:
    """What must be the same."""
    return [(folder / name).read_bytes() if (folder / name).is_file() else b"" for name in COMPARED]


def measure(root: Path, plan: Sequence[str], seed: int, found: list[dict[str, Any]], keep: Callable[[Any], None]) -> dict[str, Any]:
    """The undisturbed run, and one for each word of the plan that is not among `found` already; kept after each."""
    draw, data = random.Random(f"{seed} {len(found)}"), root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    began = time.monotonic()
    if start(root / "whole", data).wait(600):
        raise RuntimeError((root / "whole.log").read_text(errors="replace")[-2000:])
    whole, expected = time.monotonic() - began, contents(root / "whole")
    for place, how in list(enumerate(plan))[len(found) :]:
        folder = root / f"run-{place}"
        one: dict[str, Any] = {"how": "over before"}
        while one["how"] == "over before":  # a run that was over sooner than the first one counts for nothing
            shutil.rmtree(folder, ignore_errors=True)
            one = disturbed(folder, data, how, draw.uniform(0, SPAN * whole), draw.randrange(2))
        one |= {"same": contents(folder) == expected, "commit": commit()}
        found.append(one)
        print(json.dumps(one), flush=True)
        keep({"runs": found})
        if one["code"] or not one["same"]:
            print(_text(folder.with_suffix(".log"))[-3000:], flush=True)
    return report(found, whole, left_over(root))


def report(found: Sequence[dict[str, Any]], whole: float, left: int) -> dict[str, Any]:
    """The figures, and whether they hold."""
    seconds = {how: sorted(one["noticed_seconds"] for one in found if one["how"] == how) for how in BOUND}
    late = sum(value > BOUND[how] for how, values in seconds.items() for value in values)
    wrong = sum(bool(one["code"]) or not one["same"] for one in found)
    return {
        "kills": len(seconds["killed"]),
        "freezes": len(seconds["frozen"]) + len(seconds[AT_START]),
        "timeout_seconds": TIMEOUT,
        "whole_run_seconds": whole,
        "noticed_seconds": {how: {"median": values[len(values) // 2], "max": values[-1]} for how, values in seconds.items() if values},
        "late": late,
        "failed_or_different": wrong,
        "processes_left": left,
        "runs": list(found),
        "holds": not (late or wrong or left),
    }


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--freezes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "rank_kills.json")
    parser.add_argument("--go-on", action="store_true", help="with the runs that are in --out")
    options = parser.parse_args()
    before = json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.go_on else []

    def keep(found: dict[str, Any]) -> None:
        head = {"machine": machine(), "versions": versions(), "commit": commit()}
        options.out.write_text(json.dumps({**head, **found}, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root), ["killed"] * options.kills + ["frozen"] * options.freezes, options.seed, before, keep)
    keep(found)
    print(json.dumps({name: value for name, value in found.items() if name != "runs"}, indent=1))
    sys.exit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
