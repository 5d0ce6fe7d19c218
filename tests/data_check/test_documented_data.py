"""docs/data.md: examples are read as the form their heading names, findings and reasons are all told, figures are those of the rows."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.forms import FORMS
from gemma_grpo.data.prompts import load_dataset_rows
from gemma_grpo.data.rejections import REASONS
from gemma_grpo.data_check.check import check_data
from gemma_grpo.data_check.findings import WORDS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
HH_RLHF = Path(os.environ.get("HH_RLHF_DIR") or Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf")
BLOCK = re.compile(r"^```(jsonl|csv)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    (section.partition("\n")[0], kind, block)
    for section in re.split(r"^###? ", TEXT, flags=re.MULTILINE)[1:]
    for kind, block in BLOCK.findall(section)
]


@pytest.mark.parametrize(("name", "kind", "block"), EXAMPLES, ids=[f"{name} {n}" for n, (name, _, _) in enumerate(EXAMPLES)])
def test_every_example_is_read_as_its_form_and_nothing_of_it_is_dropped(tmp_path: Path, name: str, kind: str, block: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_text(block, encoding="utf-8")
    loaded = load_dataset_rows(path, strict=True)
    assert loaded.form == name
    assert loaded.kept + getattr(loaded, "merged", 0) == loaded.rows > 0


def test_every_form_has_an_example_and_every_reason_and_finding_is_told() -> None:
    assert {name for name, _, _ in EXAMPLES} == set(FORMS)
    assert not {reason for reason in REASONS if f"`{reason}`" not in TEXT}
    assert not {name for name in WORDS if f"`{name}`" not in TEXT}


@cache
def figures(name: str) -> dict[str, str]:
    """The table's column for one of the real files."""
    told: dict[str, Any] = check_data(load_dataset_rows(HH_RLHF / f"{name}.dev.jsonl.gz"), GRPOConfig()).to_dict()
    found = {one["name"]: one for one in told["findings"]}
    details = {key: one["details"] for key, one in found.items()}
    bias = details["length_bias"]["the longer wins"]
    return {
        "usable rows": f"{told['kept']:,} of {told['rows']:,}",
        **{f"dropped: `{reason}`": str(details["dropped"][reason]) for reason in details["dropped"]},
        "conversations": f"{told['conversations']:,}",
        "rows held out": str(told["rows_held_out"]),
        "the longer wins": f"{bias['value']:.1%} [{bias['interval'][0]:.1%} to {bias['interval'][1]:.1%}]",
        "exact or normalised duplicates": str(found["exact_duplicates"]["count"] + found["normalised_duplicates"]["count"]),
        "near duplicates": str(found["near_duplicates"]["count"]),
        "held-out rows near one of training": str(found["split_leaks"]["count"]),
        "rows that go on with another row's chosen reply": str(details["continued_replies"]["goes on with the chosen"]),
        "rows that go on with another row's rejected reply": str(details["continued_replies"]["goes on with the rejected"]),
        "opposite labels": str(found["opposite_labels"]["count"]),
        "identical replies": str(found["identical_replies"]["count"]),
        "replies without a letter or digit": str(found["empty_replies"]["count"]),
        "role labels inside a reply": str(found["role_labels"]["count"]),
        "e-mail addresses": str(details["contact_data"]["e-mail"]),
        "phone numbers": str(details["contact_data"]["phone"]),
        "keys, cards, bank accounts": str(found["secrets"]["count"]),
        "chosen replies that decline": f"{details['refusals']['chosen']['value']:.1%}",
        "rejected replies that decline": f"{details['refusals']['rejected']['value']:.1%}",
        "rows guessed as English": f"{details['languages']['English']:,}",
        "rows of unknown language": f"{details['languages']['unknown']:,}",
    }


@pytest.mark.parametrize(("column", "name"), [(1, "harmless-base"), (2, "helpful-base")])
def test_the_figures_are_those_of_the_real_rows(column: int, name: str) -> None:
    if not (HH_RLHF / f"{name}.dev.jsonl.gz").is_file():
        pytest.skip(f"no {name}.dev.jsonl.gz: set HH_RLHF_DIR to the folder of real hh-rlhf rows")
    table = TEXT.split("<!-- figures:")[1].split("\n\n")[0].splitlines()[3:]
    told = {cells[0]: cells[column] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}
    assert told == figures(name)
