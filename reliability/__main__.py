"""The figures of docs/reliability.md, from the JSON files that the scripts here wrote: `python -m reliability`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.document import WrittenPart
from reliability.rank_kills import AT_START
from reliability.writer_kills import RESULTS

FIGURES = WrittenPart(
    Path(__file__).resolve().parents[1] / "docs" / "reliability.md",
    begin="<!-- figures, written by python -m reliability -->\n",
    end="<!-- figures: end -->\n",
)


def table(results: Path = RESULTS) -> str:
    """A row for each result there is: what was done, what came of it, and the command that does it again."""
    rows = [(name, *row(read(results / f"{name}.json"))) for name, row in ROWS.items() if (results / f"{name}.json").is_file()]
    lines = ["| What | Found | Command |", "|---|---|---|"]
    lines += [f"| {what} | {found} | `python -m reliability.{name}` |" for name, what, found in rows]
    return "\n".join(lines) + "\n"


def read(path: Path) -> Mapping[str, Any]:
    """One result."""
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def trainer_kills(found: Mapping[str, Any]) -> tuple[str, str]:
    moments = ", ".join(f"{name} {count}" for name, count in found["killed_while"].items())
    runs = len(found["kills_of_each_run"])
    what = f"{found['kills']:,} SIGKILLs of {runs} whole runs ({moments})"
    return what, f"{found['mismatches']} of {found['files_compared'] * runs:,} files differ from the undisturbed run's"


def writer_kills(found: Mapping[str, Any]) -> tuple[str, str]:
    middle = f"{found['killed_in_the_middle_of_a_save']:,} in the middle of a save"
    return f"{found['kills']:,} SIGKILLs of a process that saves, {middle}", f"{found['bad_states']} bad states"


def fuzz_parser(found: Mapping[str, Any]) -> tuple[str, str]:
    return f"{found['runs']:,} inputs to the parser of rows ({found['fuzzer']})", f"{found['crashes']} crashes or broken laws"


def mutants(found: Mapping[str, Any]) -> tuple[str, str]:
    return f"{found['mutants']} planted bugs, one at a time", f"{found['caught']} seen by the test that is there for them"


def checkpoint_cost(found: Mapping[str, Any]) -> tuple[str, str]:
    share, stop = found["share"], found["stop_seconds"]
    shares = f"{share['median']:.2%} of the step's time ({share['min']:.2%} to {share['max']:.2%})"
    ends = f"SIGTERM to the end {stop['median']:.1f} s ({stop['min']:.1f} to {stop['max']:.1f})"
    return "a checkpoint after every step, and stops, on the 270m shape", f"{shares}; {ends}"


def page_fuzz(found: Mapping[str, Any]) -> tuple[str, str]:
    return f"{found['requests']:,} requests to the page, made up by schemathesis", (
        f"{found['server_errors']} server errors, {found['without_safe_headers']} answers without the safe headers"
    )


def page_load(found: Mapping[str, Any]) -> tuple[str, str]:
    answers, steps, slowed, memory = found["answer_seconds"], found["steps"], found["slowed_by"], max(found["memory_growth"].values())
    what = f"{found['requests']:,} requests and 64 open streams in {found['seconds']:.0f} s, beside a training; as long under attack"
    return what, (
        f"{found['errors']} errors; 99 % of the answers within {answers['p99']:.3f} s, the slowest {answers['max']:.3f} s; a step takes "
        f"{slowed['loaded']:+.1%} of its time more under load, {slowed['attacked']:+.1%} under attack (medians of {steps['loaded']} and "
        f"{steps['attacked']} beside {steps['quiet']}); the server's memory {memory:+.1%}"
    )


def rank_kills(found: Mapping[str, Any]) -> tuple[str, str]:
    seconds = {how: f"{one['median']:.1f} s, {one['max']:.1f} s at most" for how, one in found["noticed_seconds"].items()}
    start = f", {seconds[AT_START]} (frozen before they had come together)" if AT_START in seconds else ""
    what = f"{found['kills']} ranks of two killed and {found['freezes']} frozen, each in a run of its own, which starts again by itself"
    return what, (
        f"{found['failed_or_different']} runs differ from the undisturbed one; the other rank ended after {seconds['killed']} (killed), "
        f"{seconds['frozen']} (frozen; timeout {found['timeout_seconds']:g} s){start}; {found['processes_left']} processes left"
    )


def two_hosts(found: Mapping[str, Any]) -> tuple[str, str]:
    what = f"two hosts (network namespaces), the cable between them pulled for {found['pulled_seconds']:g} s"
    same = "as the undisturbed run, byte for byte" if found["same"] else "other than the undisturbed run"
    return what, f"{found['steps_without_cable']} steps meanwhile; both start again by themselves and end {same}"


ROWS = {
    "trainer_kills": trainer_kills,
    "writer_kills": writer_kills,
    "fuzz_parser": fuzz_parser,
    "mutants": mutants,
    "checkpoint_cost": checkpoint_cost,
    "page_fuzz": page_fuzz,
    "page_load": page_load,
    "rank_kills": rank_kills,
    "two_hosts": two_hosts,
}
"""Result -> its row."""


def main() -> None:
    """Print the table and write it to the document."""
    print(table(), end="")
    FIGURES.write(table())


if __name__ == "__main__":
    main()
