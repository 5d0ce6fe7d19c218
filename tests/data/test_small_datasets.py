"""Datasets with nothing in them, with one row, or with less than a step asks for: trained on as they are, or refused with the counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo.data.hh_rlhf import load_hh_rlhf
from gemma_grpo.data.prompts import conversation_id, is_held_out, load_dataset_rows
from gemma_grpo.data.sources import DataError

HOLDOUT = 0.25
TEXTS = [f"question {index}" for index in range(40)]
HELD_OUT = [text for text in TEXTS if is_held_out(conversation_id([{"role": "user", "content": text}]), HOLDOUT)]
TRAINED = [text for text in TEXTS if text not in HELD_OUT]


def pair(text: str, reply: str = "yes") -> dict[str, str]:
    return {"chosen": f"\n\nHuman: {text}\n\nAssistant: {reply}", "rejected": f"\n\nHuman: {text}\n\nAssistant: no"}


EMPTY = [pair(text, "") for text in TEXTS[:9]]
DIFFER = [{**pair(text), "rejected": pair(f"{text}?")["rejected"]} for text in TEXTS[:2]]
REMEDY = (
    "read as transcripts: chosen, rejected (texts of Human: and Assistant: turns, as hh-rlhf has them). "
    "Look at a row that is none of these: docs/data.md has an example of each form."
)


# ---- nothing usable


def test_rows_that_are_all_dropped_say_how_many_for_which_reason() -> None:
    rows = [*EMPTY, *DIFFER, {"chosen": 1, "rejected": 2}]
    for load in (load_hh_rlhf, load_dataset_rows):
        with pytest.raises(DataError) as refused:
            load(rows)
        assert str(refused.value) == (
            "the given rows: none of 12 rows is usable (empty_final_reply 9, prompts_differ 2, not_a_pair 1); "
            f"columns found: chosen, rejected, {REMEDY}"
        )


@pytest.mark.parametrize("content", ["\n", "\n \n\r\n", "\ufeff\n"])
def test_a_file_of_blank_lines_holds_no_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as refused:
        load_dataset_rows(path)
    assert str(refused.value) == f"{path} holds no rows. Download it again, or give another file."


@pytest.mark.parametrize("rows", [[], (), iter([])])
def test_no_rows_at_all_are_an_error(rows: Any) -> None:
    with pytest.raises(DataError, match=r"^the given rows holds no rows\."):
        load_dataset_rows(rows)


def test_an_empty_json_list_holds_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.json holds no rows\."):
        load_dataset_rows(path)


# ---- less than a step asks for


def test_one_row_is_trained_on(train_tiny: Callable[..., Any]) -> None:
    run = train_tiny(dataset=[{"prompt": TRAINED[0]}], batch_size=4, max_steps=3, epochs=2.0)
    assert [line["step"] for line in run.lines("metrics.jsonl")] == [1, 2]  # an epoch is one step
    assert run.json("run.json")["data"]["prompts_train"] == 1
    assert [len(group) for group in run.completions("text")] == [3, 3]


def test_the_last_batch_of_an_epoch_is_as_short_as_the_rows_leave_it(train_tiny: Callable[..., Any]) -> None:
    rows = [{"prompt": text} for text in TRAINED[:5]]
    run = train_tiny(dataset=rows, batch_size=2, gradient_accumulation_steps=2, max_steps=4, epochs=2.0)
    steps = [line["step"] for line in run.lines("samples.jsonl")]
    assert [steps.count(step) for step in (1, 2, 3, 4)] == [4, 1, 4, 1]  # 5 prompts, 4 a step
    prompts = [json.dumps(line["prompt"]) for line in run.lines("samples.jsonl")]
    assert sorted(prompts[:5]) == sorted(prompts[5:])  # each epoch has every prompt once
    assert len(set(prompts)) == 5


def test_a_reward_is_trained_on_one_pair(train_tiny: Callable[..., Any]) -> None:
    run = train_tiny(dataset=[pair(TRAINED[0])], reward={"generative": 1.0}, max_steps=1)
    assert run.json("reward/calibration.json")["pairs_trained"] == 1


def test_rows_that_are_all_held_out_or_too_long_are_refused_with_the_counts(train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    held_out = [{"prompt": text} for text in HELD_OUT[:2]]
    with pytest.raises(DataError) as refused:
        train_tiny(dataset=[*held_out, {"prompt": "x" * 99}], max_prompt_length=64, output_dir=str(tmp_path / "run"))
    assert str(refused.value) == (
        "no training prompt is left of 3 rows (dropped: {'prompt_too_long': 1}, held out: 2). "
        "Raise max_prompt_length (64), lower data.holdout (0.25), or give more rows."
    )
    assert not (tmp_path / "run").exists()


def test_pairs_without_one_to_train_the_reward_on_are_refused_with_the_counts(train_tiny: Callable[..., Any]) -> None:
    counts = r"1 rows \(dropped: \{'pair_too_long': 1\}, held out: 0\)"
    with pytest.raises(DataError, match=rf"^no training pair is left of {counts}\. Raise reward_model\.max_length \(256\)"):
        train_tiny(dataset=[pair(TRAINED[0], "y" * 300)], reward={"generative": 1.0}, **{"reward_model.max_length": 256})


def test_an_evaluation_without_a_held_out_prompt_says_so(train_tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = train_tiny(dataset=[{"prompt": TRAINED[0]}], max_steps=1, **{"evaluation.num_prompts": 4})
    assert run.json("run.json")["data"]["prompts_held_out"] == 0
    assert "evaluation: 0 held-out prompts" in capsys.readouterr().out
    assert run.evaluation == {}
