"""The applications end to end: prompt sets, dry runs, the documents' commands and figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_programs import HOSTILE

from bench.applications import APPLICATIONS, DOCUMENT, MINIATURE, RESULTS, table
from gemma_grpo.cli import run
from gemma_grpo.config import load_recipe, parse_overrides
from gemma_grpo.data.bundled import bundled_names, bundled_rows, canned_replies
from gemma_grpo.data.prompts import conversation_id, is_held_out, load_dataset_rows
from gemma_grpo.data.sources import DataError
from gemma_grpo.grpo.canned import check_canned
from gemma_grpo.planner import PreflightError
from gemma_grpo.reward.sandbox.running import why_not
from gemma_grpo.types import Prompt

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "docs" / "your-own-reward.md"


def rows_of(name: str) -> list[Any]:
    loaded = load_dataset_rows(bundled_rows(f"bundled:{name}"), strict=True)
    return list(getattr(loaded, "pairs", None) or loaded.prompts)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_prompt_set_has_24_prompts_some_held_out_and_two_replies_to_each(name: str) -> None:
    items = rows_of(name)
    names = [conversation_id(item.messages) for item in items]
    held_out = sum(is_held_out(one, load_recipe(name).data.holdout) for one in names)
    assert len(set(names)) == len(items) >= 24
    assert 4 <= held_out <= len(items) / 2
    for item in items:
        columns = {"chosen": getattr(item, "chosen", None), **item.columns}
        replies = canned_replies(Prompt("x", "s", item.messages, (2,), "c", columns))
        assert replies is not None
        assert replies[0] != replies[1]


def test_the_recipes_are_the_prompt_sets() -> None:
    assert sorted(APPLICATIONS) == bundled_names()
    assert [load_recipe(name).dataset for name in APPLICATIONS] == [f"bundled:{name}" for name in APPLICATIONS]
    for name in APPLICATIONS:
        load_recipe(name, parse_overrides(list(MINIATURE), name))  # raises for a setting that is none


def test_an_unknown_prompt_set_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no prompt set 'bundled:tutorin' is bundled\. Did you mean bundled:tutoring\?"):
        bundled_rows("bundled:tutorin")


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = run(["train", *words, "model_name=miniature", "--dry-run"])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_dry_run_ranks_the_canned_replies(capsys: pytest.CaptureFixture[str], name: str) -> None:
    if name == "code" and why_not() is not None:
        pytest.skip(f"programs cannot be shut in here: {why_not()}")
    code, text = dry_run(capsys, name)
    count = len(rows_of(name))
    assert code == 0, text
    assert f"the good one above the bad one on {count} of {count} prompts" in text


def test_a_reward_that_likes_the_bad_reply_ends_with_3_and_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = dry_run(capsys, "tutoring", "reward={guides: -1.0}")
    assert code == 3
    assert "put a bad canned reply at or above the good one on 36 of 36 prompts" in text
    assert "guides 1.00 against 0.00" in text
    assert "and 33 more" in text


def test_a_tie_is_a_loss_and_what_could_not_be_sampled_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = dry_run(capsys, "tutoring", "reward={empty: 1.0}")
    assert (code, "on 36 of 36 prompts" in text) == (3, True)
    _, text = dry_run(capsys, "content", "max_completion_length=12")
    kept, left_out = re.findall(r"of (\d+) prompts \((\d+) more left out: the good one is longer", text)[0]
    assert int(kept) + int(left_out) == 32
    assert int(left_out) > 0


def test_without_canned_replies_nothing_is_said() -> None:
    assert check_canned(None) is None
    with pytest.raises(PreflightError, match=r"on 1 of 2 prompts: this one.*a program was ended \(1 time\)"):
        check_canned({"lost": ["this one"], "prompts": 2, "warnings": ["a program was ended (1 time)."]})


def test_the_documents_figures_are_those_of_the_results_and_every_reward_rose() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    document = DOCUMENT.path.read_text(encoding="utf-8")
    assert DOCUMENT.filled(document, table(results)) == document, "run python -m bench.applications"
    for name, one in results["applications"].items():
        assert one["steps"] == 20
        assert one["reward"]["interval"][0] > 0, name


def test_every_application_is_measured() -> None:
    assert list(json.loads(RESULTS.read_text(encoding="utf-8"))["applications"]) == list(APPLICATIONS)


def test_the_documents_counts_are_those_of_the_files() -> None:
    text = DOCUMENT.path.read_text(encoding="utf-8")
    for name in APPLICATIONS:
        assert re.search(rf"^\| `{name}` \| {len(rows_of(name))}\b", text, re.MULTILINE), name
        assert f"gemma-grpo train {name}" in text
    assert f"runs {len(HOSTILE)} hostile programs" in text


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_road_to_your_own_reward_can_be_walked_as_it_is_written(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gemma-grpo").write_text(f'#!/bin/sh\nexec {sys.executable} -m gemma_grpo.cli "$@"\n', encoding="utf-8")
    (tools / "gemma-grpo").chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = "set -e\n" + "\n".join(blocks(OWN))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the good one above the bad one on 12 of 12 prompts" in done.stdout
    evaluation = json.loads((tmp_path / "shop" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["reward"]["gain"] > 0
    assert (tmp_path / "shop" / "report.html").is_file()
