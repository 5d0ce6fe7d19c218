"""Plant one bug at a time in a copy of the code, and see the test that is there for it go red: `make mutants`, JSON out.

A bug that no test notices survives; so does one whose text is no longer in the code. Exit code 1 where any did. The copy is made in a
temporary folder; nothing here is changed. The bugs are in mutant_list.py and mutants_of_*.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.machine import commit, machine, versions
from reliability.mutant_list import MUTANTS, Mutant
from reliability.mutants_of_exports import MUTANTS_OF_EXPORTS
from reliability.mutants_of_strangers import MUTANTS_OF_STRANGERS
from reliability.writer_kills import RESULTS

ROOT = Path(__file__).resolve().parents[1]
ALL = (*MUTANTS, *MUTANTS_OF_STRANGERS, *MUTANTS_OF_EXPORTS)
COPIED = ("gemma_grpo", "tests", "bench", "reliability", "scripts", "recipes", "docs", "pyproject.toml", "README.md", "Makefile")
TESTS_FAILED = 1
"""pytest's exit code when tests ran and some were red; every other says that they could not run."""
LONGEST = 600
"""Seconds that the tests of one mutant may take: one that hangs was noticed too, and is told as such."""


def copied(into: Path) -> None:
    """The code and its tests."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, into / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy2(source, into / name)
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (into.parent / "shared").symlink_to(shared)


def tested(folder: Path, tests: tuple[str, ...]) -> tuple[int | None, str]:
    """Exit code and last line of pytest on these tests; None when they took too long. Whatever they started ends with them."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "--show-capture=no", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code: int | None = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            code = None
        end_all(folder, process)
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    return code, next((line for line in reversed(lines) if line.startswith("FAILED")), lines[-1] if lines else "")


def end_all(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Kill what a mutant may have left running: some are there to leave orphans, in sessions of their own. They have the copy's path."""
    mark = f"PYTHONPATH={folder}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # others' processes, and those that have just ended
            if mark in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
    process.wait()


def judged(mutant: Mutant, folder: Path) -> dict[str, Any]:
    """Whether the mutant's test went red."""
    path, started = folder / mutant.file, time.perf_counter()
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    outcome, last = f"its text is there {count} times", ""
    if count == 1:
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            code, last = tested(folder, (mutant.test,))
        finally:
            path.write_text(text, encoding="utf-8")
        outcome = {TESTS_FAILED: "red", 0: "SURVIVED", None: "red (hung)"}.get(code, f"could not run (exit code {code})")
    seconds = round(time.perf_counter() - started, 1)
    return {**vars(mutant), "outcome": outcome, "said": last[:300], "seconds": seconds, "commit": commit()}


def run(mutants: tuple[Mutant, ...], show: bool = True) -> dict[str, Any]:
    """Each mutant alone; before them their tests on the code as it is, which must be green."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "code"
        folder.mkdir()
        copied(folder)
        code, last = tested(folder, tuple(dict.fromkeys(mutant.test for mutant in mutants)))
        if code != 0:
            raise SystemExit(f"error: without a bug the tests are not green (exit code {code}): {last}")
        rows = []
        for mutant in mutants:
            rows.append(judged(mutant, folder))
            if show:
                print(f"{rows[-1]['outcome']:<12} {mutant.name:<62} {mutant.test.rpartition('::')[2][:90]}", flush=True)
    return summary(rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many were caught, which were not, and each."""
    survived = [row["name"] for row in rows if not row["outcome"].startswith("red")]
    return {"mutants": len(rows), "caught": len(rows) - len(survived), "survived": survived, "rows": rows}


def main() -> None:
    """Plant, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="mutants whose name contains this; writes no result")
    parser.add_argument("--survivors", action="store_true", help="plant only those that the last result says survived, or does not have")
    parser.add_argument("--out", type=Path, default=RESULTS / "mutants.json")
    options = parser.parse_args()
    chosen = tuple(mutant for mutant in ALL if options.only is None or options.only in mutant.name)
    rows: list[dict[str, Any]] = []
    if options.survivors:
        names = {mutant.name for mutant in chosen}
        found = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in found if row["outcome"].startswith("red") and row["name"] in names]
        chosen = tuple(mutant for mutant in chosen if mutant.name not in {row["name"] for row in rows})
    report = {"machine": machine(), "commit": commit(), "versions": versions(), **summary([*rows, *run(chosen)["rows"]])}
    print(f"{report['caught']} of {report['mutants']} caught")
    if options.only is None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["survived"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
