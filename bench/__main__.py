"""Everything that docs/performance.md shows: `make bench`, or `python -m bench`; exit code 1 when a promise is not kept.

Measures each model and workload beside TRL and the growth of our own cost, skips what is already in bench/results (`--again` does not),
then draws the charts and puts the table into the document. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.chart import bars
from bench.document import WrittenPart
from bench.protocol import MIB
from bench.step import MODELS, RESULTS, ROOT, run
from bench.workload import WORKLOADS

TABLE = WrittenPart(ROOT / "docs" / "performance.md", begin="<!-- bench: table, written by make bench -->\n", end="<!-- bench: end -->\n")
RUNS = [(model, workload) for model in MODELS for workload in WORKLOADS if workload != "c" or model != "270m"]
"""The 270m shape does not run (c): on a CPU a step of TRL's takes many minutes there."""
HEADINGS = ("shape, workload", "ours, s", "TRL, s", "faster", "of pairs", "tokens/s", "TRL's", "peak, MiB", "TRL's", "smaller", "commit")
FASTER = {("8m", "a"): 3.0, ("8m", "b"): 5.0, ("8m", "c"): 4.0, ("270m", "a"): 2.0, ("270m", "b"): 4.0, ("4b", "b"): 5.0}
"""How many times as fast as TRL a step has to be, by the median of the pairs."""
SMALLER = 2.0
"""How many times TRL's peak memory has to be of ours."""


def read_reports(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results there are, in the order of RUNS."""
    paths = [folder / f"step-{model}-{workload}.json" for model, workload in RUNS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: medians of both sides, and the median of the paired ratios with the smallest and the largest."""
    if not reports:
        return ""
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *(_row(report) for report in reports)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(report: Mapping[str, Any]) -> tuple[str, ...]:
    summary, setting = report["summary"], report["setting"]
    ours, trl, ratio = summary["ours"], summary["trl"], summary["paired_ratio"]
    return (
        f"{setting['model']} ({setting['workload']})",
        f"{ours['seconds']['median']:.2f}",
        f"{trl['seconds']['median']:.2f}",
        f"**{ratio['median']:.1f}x**",
        f"{ratio['min']:.1f} to {ratio['max']:.1f}",
        f"{ours['tokens_per_second']:.0f}",
        f"{trl['tokens_per_second']:.0f}",
        f"{ours['peak_bytes']['median'] / MIB:.0f}",
        f"{trl['peak_bytes']['median'] / MIB:.0f}",
        f"{summary['memory_ratio']['median']:.1f}x",
        report["commit"],
    )


def missed(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the results do not reach of FASTER and SMALLER, a sentence each."""
    found = []
    for report in reports:
        model, workload = report["setting"]["model"], report["setting"]["workload"]
        for text, name, least in (("as fast", "paired_ratio", FASTER.get((model, workload), 1.0)), ("as small", "memory_ratio", SMALLER)):
            reached = report["summary"][name]["median"]
            if reached < least:
                found.append(f"{model} ({workload}): {reached:.2f} times {text} as TRL; at least {least} is promised")
    return found


def chart(reports: Sequence[Mapping[str, Any]]) -> str:
    """SVG: a step's phases, ours above TRL's."""
    rows = []
    for report in reports:
        name = f"{report['setting']['model']} ({report['setting']['workload']})"
        rows += [(f"{name} ours", report["summary"]["ours"]["phases"]), ("TRL", report["summary"]["trl"]["phases"])]
    return bars(rows, "One step: rollout and two updates (medians)")


def write() -> None:
    """Table and chart of the results there are."""
    reports = read_reports()
    if not reports:
        return
    print(table(reports), end="")
    (RESULTS / "step.svg").write_text(chart(reports), encoding="utf-8")
    TABLE.write(table(reports))


def main() -> None:
    """All of it; what cannot run here says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure although result files are there")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--write-only", action="store_true", help="measure nothing: table and charts from the results there are")
    options = parser.parse_args()
    again = ["--again"] if options.again else []
    if not options.write_only:
        for model, workload in RUNS:
            run(model, workload, options.pairs, again=options.again)
        # a process of its own: its memory is not to hold what the bench held before
        growth = subprocess.run([sys.executable, "-m", "bench.growth", *again], check=False, cwd=ROOT).returncode
    write()
    broken = missed(read_reports())
    print(*(f"bench: MISSED: {one}." for one in broken), sep="\n", end="")
    if broken or (not options.write_only and growth):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
