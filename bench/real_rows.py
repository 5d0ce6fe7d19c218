"""The reward report on real hh-rlhf rows: `python -m bench.real_rows FOLDER`, bench/results/real_rows.json and a table of the docs out.

FOLDER holds hh-rlhf files, one for each source (`harmless-base....jsonl.gz`). Each base trains an adapter for every source and is measured
on conversations that it did not see, beside TF-IDF with logistic regression on the same pairs in the same run. The bases are what there is
without the Hub: the miniature, whose world is not these rows, and the 270m shape with random weights on the shortest rows. Neither can
show how good a judge Gemma 3 makes; they show that the report is made whole, and what it says of a judge that knows nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from bench.document import WrittenPart
from bench.machine import commit, machine, versions

RESULTS = Path(__file__).parent / "results" / "real_rows.json"
DOCUMENT = WrittenPart(
    Path(__file__).parents[1] / "docs" / "overoptimisation.md",
    "<!-- real rows, written by python -m bench.real_rows -->\n",
    "<!-- real rows: end -->\n",
)
COMMON = ("reward_model.per_source=true", "witness.share=0", "data.holdout=0.2")
MINIATURE = ("reward_model.max_length=512", "max_prompt_length=384", "reward_model.batch_size=32", "reward_model.max_pairs=null")
SHAPE_270M = ("reward_model.max_length=320", "max_prompt_length=256", "max_completion_length=16", "reward_model.batch_size=8")
LETTERS_270M, ROWS_270M = 260, 60
"""The 270m shape reads rows of at most so many letters a side, a letter a token, and so many of them: minutes on two cores, not hours."""
ACCURACIES = {
    "accuracy": "reward adapters, all pairs",
    "accuracy_lexical": "TF-IDF and logistic regression, the same pairs",
    "accuracy_zero_shot": "before training",
    "longer_wins": "the longer reply wins",
    "closest_length_quarter": "reward adapters, closest lengths",
    "without_sibling": "reward adapters, conversations met once",
}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The files' rows as published, with their source, the sources taking turns. Raises ValueError for a folder without any."""
    files = sorted(folder.glob("*.jsonl.gz"))
    if not files:
        raise ValueError(f"{folder} has no .jsonl.gz of hh-rlhf. Give the folder of harmless-base and helpful-base rows.")
    read = []
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            read.append([{**json.loads(line), "source": path.name.split(".")[0]} for line in lines])
    return [row for row in chain.from_iterable(zip_longest(*read)) if row is not None]


def short(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the 270m shape reads."""
    return [row for row in rows if max(len(str(row["chosen"])), len(str(row["rejected"]))) <= LETTERS_270M][:ROWS_270M]


def train(words: Sequence[str], rows: Sequence[Mapping[str, Any]], place: Path) -> dict[str, Any]:
    """One reward training from the command line; its calibration.json, and what was made of the rows."""
    place.mkdir()
    made_by = commit()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = [*words, f"dataset={place / 'rows.jsonl'}", f"output_dir={place / 'run'}", *COMMON]
    subprocess.run([sys.executable, "-m", "gemma_grpo.cli", "train-reward", *given], check=True)
    calibration = json.loads((place / "run" / "reward" / "calibration.json").read_text(encoding="utf-8"))
    data = json.loads((place / "run" / "run.json").read_text(encoding="utf-8"))["data"]
    canaries = calibration.pop("canaries")
    del data["examples"]  # rows as published: they stay where they are
    settings = [word for word in (*words, *COMMON) if not word.startswith("model_name=")]
    kept = {name: canaries[name] for name in ("prompts", "beside", "above") if name in canaries}
    return {"commit": made_by, "settings": settings, "data": data, "calibration": calibration, "canaries": kept}


def table(results: Mapping[str, Any]) -> str:
    """One column for each base."""
    bases = results["bases"]
    rows = ["| | " + " | ".join(bases) + " |", "|---" * (len(bases) + 1) + "|"]
    rows.append("| pairs trained on, held out | " + " | ".join(_counts(one["calibration"]) for one in bases.values()) + " |")
    found = {name: [one["calibration"].get(name) for one in bases.values()] for name in ACCURACIES}
    rows += [f"| {title} | {' | '.join(map(_share, found[name]))} |" for name, title in ACCURACIES.items()]
    sources = sorted({source for one in bases.values() for source in one["calibration"]["by_source"]})
    for source in sources:
        cells = [_share(one["calibration"]["by_source"].get(source)) for one in bases.values()]
        rows.append(f"| reward adapter, {source} | {' | '.join(cells)} |")
    rows.append(
        "| canaries above the mean preferred reply | " + " | ".join(f"{one['canaries']['above']:.0%}" for one in bases.values()) + " |"
    )
    return "\n".join(rows) + "\n"


def _counts(calibration: Mapping[str, Any]) -> str:
    return f"{calibration['pairs_trained']:,}, {calibration['pairs_held_out']:,}"


def _share(found: Mapping[str, Any] | None) -> str:
    if not found or found["value"] is None:
        return "–"
    low, high = found["interval"]
    return f"{100 * found['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the hh-rlhf files lie")
    parser.add_argument("--bases", nargs="+", default=["miniature", "270m"], choices=["miniature", "270m"])
    options = parser.parse_args()
    rows = read_rows(options.folder)
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"bases": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for base in options.bases:
            place = Path(temporary) / base
            if base == "miniature":
                results["bases"]["miniature"] = train(["miniature", *MINIATURE], rows, place)
            else:
                weights = Path(temporary) / "weights"
                subprocess.run([sys.executable, "-m", "bench.random_checkpoint", "270m", str(weights)], check=True)
                words = ["gemma3-270m", f"model_name={weights}", *SHAPE_270M]
                results["bases"]["270m shape, random weights"] = train(words, short(rows), place)
            head = {"machine": machine(), "versions": versions()}
            RESULTS.write_text(json.dumps(results | head, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write(table(results))


if __name__ == "__main__":
    main()
