"""Coverage-guided fuzzing of everything that reads strangers' rows: `python -m reliability.fuzz_parser --runs 1000000`, JSON out.

atheris (libFuzzer for Python; `pip install atheris`) mutates a small corpus of transcripts, messages, rows and files, and the real
hh-rlhf rows where there are any (HH_RLHF_DIR). The first byte of an input chooses what reads the rest. An input is a crash when anything
but the typed errors is raised, or when what was read breaks a law below. Exit code 1 when there was one; the JSON then holds the input.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from bench.machine import commit, machine, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "reliability" / "results"
REAL_ROWS = Path(os.environ.get("HH_RLHF_DIR") or ROOT.parent / "shared" / "data" / "hh-rlhf")
MAX_LENGTH = 4096
LABELS = {"user": "Human", "assistant": "Assistant"}


# ---- the laws


def rendered(turns: list[Any]) -> str:
    """A transcript of these turns, as hh-rlhf writes it."""
    return "".join(f"\n\n{LABELS[turn['role']]}: {turn['content']}" for turn in turns)


def stripped(text: str) -> str:
    """A transcript with the white space around every turn taken away, worked out without the parser's expression."""
    if text.lstrip().startswith(("Human:", "Assistant:")):
        text = "\n\n" + text.lstrip()
    marked = text
    for label in LABELS.values():  # U+0000 and U+0001 as marks: a text that holds them itself is left to the other law
        for blank_line in ("\n\n", "\n\r\n"):
            marked = marked.replace(f"{blank_line}{label}:", f"\0{label}\1")
    _, *turns = marked.split("\0")
    return "".join(f"\n\n{label}: {content.strip()}" for label, _, content in (turn.partition("\1") for turn in turns))


def read_transcript(data: bytes) -> None:
    """What is accepted reads back the same, and is the text itself but for white space around turns."""
    from gemma_grpo.data.hh_rlhf import transcript_turns

    try:
        text = data.decode("utf-8", "surrogatepass")  # JSON can spell them, so the parser meets them
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    turns = transcript_turns(text)
    if turns is None:
        return
    assert turns
    assert transcript_turns(rendered(turns)) == turns
    assert not set("\0\1").isdisjoint(text) or rendered(turns) == stripped(text)


def read_messages(data: bytes) -> None:
    """Messages are a known role with stripped text, each, or nothing at all."""
    from gemma_grpo.data.hh_rlhf import message_turns

    value = _json_or_none(data)
    turns = message_turns(value)
    assert turns is None or [turn["role"] for turn in turns] == [item["role"] for item in value]
    assert all(turn["content"] == turn["content"].strip() and turn["role"] in (*LABELS, "system") for turn in turns or ())


def read_rows(data: bytes) -> None:
    """Every row is a pair, or counted; so is every row as a prompt."""
    value = _json_or_none(data)
    _check_rows(value if isinstance(value, list) else [value])


def read_file(data: bytes) -> None:
    """A .jsonl file gives one row for each line that is not blank, or a DataError that names it."""
    _check_file("rows.jsonl", data)


def read_gzip(data: bytes) -> None:
    """So does a .jsonl.gz file: of these bytes as they are, or (when they cannot be one) of what they compress to."""
    _check_file("rows.jsonl.gz", data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 1))


TARGETS: tuple[Callable[[bytes], None], ...] = (read_transcript, read_messages, read_rows, read_file, read_gzip)
_SCRATCH = tempfile.TemporaryDirectory(prefix="fuzz-parser-")


def check(data: bytes) -> None:
    """Give an input to the reader that its first byte chooses. Raises whatever a crash is."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _check_rows(rows: list[Any]) -> None:
    from gemma_grpo.data.hh_rlhf import DataError, alternates, parse_pairs
    from gemma_grpo.data.prompts import parse_prompts

    loaded = parse_pairs(rows)
    assert loaded.rows == len(rows) == loaded.kept + loaded.merged + sum(loaded.dropped.values())
    for pair in loaded.pairs:
        assert pair.chosen.strip() == pair.chosen != "" != pair.rejected == pair.rejected.strip()
        assert pair.messages[-1]["role"] == "user"
        assert alternates(pair.messages)
        json.dumps([pair.messages, pair.chosen, pair.rejected], ensure_ascii=False).encode()
    prompts = parse_prompts(rows)
    assert prompts.rows == len(rows) == prompts.kept + sum(prompts.dropped.values())
    assert all(prompt.messages[-1]["role"] == "user" and prompt.messages[-1]["content"] for prompt in prompts.prompts)
    try:
        parse_pairs(rows, strict=True)
        stopped = False
    except DataError:
        stopped = True
    assert stopped == any(loaded.dropped.values())


def _check_file(name: str, data: bytes) -> None:
    from gemma_grpo.data.sources import DataError, open_rows

    path = Path(_SCRATCH.name) / name
    path.write_bytes(data)
    try:
        numbered, refused = list(open_rows(path).numbered), ""
    except DataError as error:
        numbered, refused = [], str(error)
    if refused:
        assert refused.startswith(str(path))
        return
    content = gzip.decompress(data) if name.endswith(".gz") else data
    lines = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in content.split(b"\n")]
    assert [number for number, _ in numbered] == [number for number, line in enumerate(lines, start=1) if line]
    _check_rows([row for _, row in numbered])


# ---- the corpus


def seeds() -> Iterator[bytes]:
    """Inputs to start from: each reader's own kind, small, and the real rows where there are any."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    texts = ["\n\nHuman: Hi\n\nAssistant: Yes", "Human: a\n\n\n\nAssistant:\n\nHuman: b\n\nAssistant: \ud800c\0", "\n\nAssistant: a"]
    row = {"chosen": texts[0], "rejected": texts[0] + "!", "source": "s", "n": [1e400, None]}
    explicit = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{"role": "assistant", "content": ""}]}
    for text in texts:
        yield bytes([0]) + text.encode("utf-8", "surrogatepass")
    yield bytes([1]) + json.dumps([{"role": "system", "content": "s"}, *turns]).encode()
    rows = [row, explicit, {"prompt": texts[0], "chosen": " a", "rejected": "b"}, {"messages": turns}, {"prompt": "p"}, "text", None]
    yield bytes([2]) + json.dumps(rows).encode()
    lines = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows) + b"\n\n{}\n"
    for target in (3, 4):
        yield bytes([target]) + lines
        yield bytes([target]) + b'{"chosen": "a", "chosen": NaN}\n[[[[[[[[[]]]]]]]]]\n"\\ud800"\n<html>'
    yield bytes([4]) + gzip.compress(lines) + gzip.compress(b"{}\n") + b"\0\0"
    for path in sorted(REAL_ROWS.glob("*.jsonl.gz")):
        with gzip.open(path, "rb") as file:
            for line in islice(file, 100):
                yield bytes([3]) + line
                yield bytes([0]) + json.loads(line)["chosen"].encode()


# ---- fuzzing


def fuzz(arguments: list[str]) -> None:
    """The worker: libFuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["gemma_grpo.data"]):
        import gemma_grpo.data.prompts  # noqa: F401 - instrumented when it is first imported
    atheris.Setup([sys.argv[0], *arguments], check)
    atheris.Fuzz()


def run(runs: int, seed: int) -> dict[str, Any]:
    """So many executions from the corpus; what was found."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        corpus, crashes = Path(temporary) / "corpus", Path(temporary) / "crashes"
        corpus.mkdir()
        crashes.mkdir()
        for number, data in enumerate(seeds()):
            (corpus / f"seed-{number:04d}").write_bytes(data[:MAX_LENGTH])
        num_seeds = len(list(corpus.iterdir()))
        flags = [f"-runs={runs}", f"-seed={seed}", f"-max_len={MAX_LENGTH}", "-timeout=60", "-print_final_stats=1"]
        flags.append(f"-artifact_prefix={crashes}/")
        words = [sys.executable, "-m", "reliability.fuzz_parser", "--worker", *flags, str(corpus)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", cwd=ROOT, check=False)
        found = [{"input": path.read_bytes().hex(), "trace": done.stdout[-3000:]} for path in sorted(crashes.iterdir())]
        executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        covered = re.findall(r"\bcov: (\d+)", done.stderr)
        if executed is None:
            raise SystemExit(f"the fuzzer did not run (exit code {done.returncode}):\n{done.stderr[-3000:]}")
        return {
            "fuzzer": "atheris",
            "runs": int(executed[1]),
            "seed": seed,
            "crashes": len(found),
            "problems": found,
            "exit_code": done.returncode,
            "seeds": num_seeds,
            "corpus": len(list(corpus.iterdir())),
            "edges_covered": int(covered[-1]) if covered else None,
            "seconds": time.perf_counter() - started,
        }


def main() -> None:
    """Fuzz, write the result, and say it."""
    if sys.argv[1:2] == ["--worker"]:
        return fuzz(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz_parser.json")
    options = parser.parse_args()
    about = {"machine": machine(), "commit": commit(), "versions": {**versions(), "atheris": version("atheris")}}
    report = {**about, **run(options.runs, options.seed)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['runs']} executions, {report['corpus']} inputs kept, {report['crashes']} crashes")
    if report["crashes"] or report["exit_code"]:
        raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()
