"""Thousands of requests made up by schemathesis from reliability/page_openapi.json: `python -m reliability.page_fuzz`, JSON out.

The page's server runs as its own process over two made-up runs. schemathesis (its command line, `st`) is on the PATH or named by --st; it
is no dependency: its own environment is the better place for it. Counted are the requests, and the answers by their status. Exit code 1
for a single 5xx, an answer without the safe headers, a status or a content type that page_openapi.json does not name, or too few requests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.machine import commit, machine, versions
from reliability.writer_kills import RESULTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the made-up runs of the tests, and the server they are served by

from page_server import TOKEN, Server  # noqa: E402
from written_runs import write_run  # noqa: E402

from gemma_grpo.monitor.web.guard import SAFE_HEADERS, page_token  # noqa: E402

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LEAST = 5000
"""Requests."""


def fuzz(st: str, examples: int, seed: int, root: Path) -> dict[str, Any]:
    """Let schemathesis ask, and read what it was answered from its log."""
    write_run(root / "runs" / "one", 12)
    write_run(root / "runs" / "two", 5, seed=1, evaluated=False)
    server = Server(root / "runs")
    own = f"http://127.0.0.1:{server.port}"
    headers = [f"Cookie: gemma-grpo-{server.port}={TOKEN}", f"Origin: {own}", f"X-Page-Token: {page_token(TOKEN)}"]
    log = root / "requests.har"
    words = [st, "run", str(ROOT / "reliability" / "page_openapi.json"), "--url", own, "--checks", CHECKS, "--seed", str(seed)]
    words += [
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        str(examples),
        "--continue-on-failure",
        "--suppress-health-check",
        "all",
    ]
    words += ["--report", "har", "--report-har-path", str(log), "--output-sanitize", "false", "--no-color"]
    done = subprocess.run(
        [*words, *(part for header in headers for part in ("-H", header))], capture_output=True, text=True, check=False, cwd=root
    )
    server.stop()
    entries = json.loads(log.read_text(encoding="utf-8"))["log"]["entries"]
    return report(entries, done.returncode, done.stdout)


def report(entries: list[dict[str, Any]], code: int, said: str) -> dict[str, Any]:
    """What the answers were."""
    answers = [entry["response"] for entry in entries if entry["response"]["status"]]
    statuses = Counter(str(answer["status"]) for answer in answers)
    without = sum(not SAFE_HEADERS.keys() <= {header["name"].lower() for header in answer["headers"]} for answer in answers)
    server_errors = sum(count for status, count in statuses.items() if status.startswith("5"))
    return {
        "requests": len(answers),
        "statuses": dict(sorted(statuses.items())),
        "server_errors": server_errors,
        "without_safe_headers": without,
        "schemathesis": code,
        "said": "" if code == 0 else said[-4000:],
        "holds": len(answers) >= LEAST and not server_errors and not without and code == 0,
    }


def main() -> None:
    """Ask, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--st", default="st", help="schemathesis' command line")
    parser.add_argument("--examples", type=int, default=500, help="for each address")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "page_fuzz.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = fuzz(options.st, options.examples, options.seed, Path(root))
    head = {"machine": machine(), "versions": versions(), "commit": commit()}
    options.out.write_text(json.dumps({**head, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
