"""How long real prompts and replies are: `python -m bench.lengths FOLDER` wrote bench/lengths.json from FOLDER's hh-rlhf files.

The numbers are committed, the rows are not: a bench must run, and draw the same lengths, where no hh-rlhf is.
A token is counted as a word, a digit group or one punctuation mark: on these rows that gives the quantiles of Gemma's own
tokenizer (prompts: median 99, p90 272, p99 533; replies: mean 45, p95 114 to 138) without the gated file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

LENGTHS = Path(__file__).with_name("lengths.json")
POINTS = 500
"""Quantiles kept of each distribution."""
FILES = ("harmless-base.dev.jsonl.gz", "helpful-base.dev.jsonl.gz")
TURN_TOKENS = 5
"""What a turn's marks take in Gemma's chat template: <start_of_turn>, the speaker, two line ends and <end_of_turn>."""
_TOKEN = re.compile(r"\w+|[^\w\s]")


def quantiles(values: Sequence[int], points: int = POINTS) -> list[int]:
    """The values in the middle of so many equal parts of the sorted ones: an even draw from them follows the whole."""
    ordered = sorted(values)
    return [ordered[int((index + 0.5) * len(ordered) / points)] for index in range(points)]


def read_lengths() -> dict[str, list[int]]:
    """Sorted token lengths, "prompts" and "replies"; a reply's stop token is counted."""
    content = json.loads(LENGTHS.read_text(encoding="utf-8"))
    return {name: content[name] for name in ("prompts", "replies")}


def main() -> None:
    """Count tokens in every usable row and write the quantiles."""
    from gemma_grpo.data.hh_rlhf import load_hh_rlhf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"holds {' and '.join(FILES)}")
    folder = parser.parse_args().folder
    pairs = [pair for file in FILES for pair in load_hh_rlhf(folder / file).pairs]
    # <bos>, and the model's turn that is left open: <start_of_turn>, the speaker, a line end
    prompts = [4 + sum(TURN_TOKENS + len(_TOKEN.findall(turn["content"])) for turn in pair.messages) for pair in pairs]
    replies = [1 + len(_TOKEN.findall(text)) for pair in pairs for text in (pair.chosen, pair.rejected)]
    source = f"{len(pairs)} usable rows of the test splits of Anthropic/hh-rlhf, harmless-base and helpful-base; {POINTS} quantiles each"
    content = {"source": source, "prompts": quantiles(prompts), "replies": quantiles(replies)}
    LENGTHS.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
