"""Tasks of the lm-evaluation-harness: both sides answer the same questions, and what is told is what they answered."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_grpo.grpo.abilities import INSTALL, _answers, check_tasks, evaluate_tasks

WHY = "lm-eval is not installed: pip install 'gemma-grpo[tasks]'"
installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=WHY)
CHOICES = (" apple", " boats", " cloud")


def little_task(folder: Path, questions: int = 12) -> dict[str, Any]:
    """A task of our own in the harness's own settings: three choices, the right ones 4, 8 and 0 times of 12."""
    rows = [{"q": f"question {n}:", "choices": list(CHOICES), "gold": n * n % 3} for n in range(questions)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test"}
    text = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": ""}
    metric = {"metric": "acc"}  # how it is summed up is the harness's default
    return {"task": "little", "output_type": "multiple_choice", **data, **text, "metric_list": [metric]}


@torch.no_grad()
def plain_accuracy(model: Any, role: str, questions: int) -> float:
    """By one forward pass for each question and choice."""
    right = 0
    for n in range(questions):
        scores = []
        for text in CHOICES:
            prompt = model.tokenizer.encode(f"question {n}:")
            choice = model.tokenizer.encode(text, add_special_tokens=False)
            with model.role(role):
                logits = model.causal_lm(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(choice)))
        right += scores[n * n % 3] == max(scores)
    return right / questions


@installed
def test_both_sides_answer_the_same_questions(new_gemma: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = new_gemma(moved=1.0, seed=4)
    found = evaluate_tasks(model, [little_task(tmp_path)], limit=None, batch_size=4, seed=0)["little"]["acc"]
    before, after = (plain_accuracy(model, role, 12) for role in ("reference", "policy"))
    assert before != after  # else this would not tell the sides apart
    assert (found["before"], found["after"], found["n"]) == (pytest.approx(before), pytest.approx(after), 12)
    assert found["interval"][0] <= found["gain"] <= found["interval"][1]
    few = evaluate_tasks(model, [little_task(tmp_path)], limit=5, batch_size=4, seed=0)["little"]["acc"]
    assert few["n"] == 5


def test_filters_are_told_apart_and_what_is_no_mean_is_left_out() -> None:
    def row(doc: int, filtered: str, match: float) -> dict[str, Any]:
        return {"doc_id": doc, "filter": filtered, "metrics": ["match", "perplexity"], "match": match, "perplexity": -3.0}

    rows = [row(n, filtered, value) for n in (0, 1) for filtered, value in (("strict", 0.0), ("flexible", float(n)))]
    told = {"match,strict": 0.0, "match,flexible": 0.5, "perplexity,strict": 20.1, "perplexity,flexible": 20.1}
    found = _answers({"samples": {"t": rows}, "results": {"t": told}})
    assert found == {"t": {"match,strict": {0: 0.0, 1: 0.0}, "match,flexible": {0: 0.0, 1: 1.0}}}
    alone = _answers({"samples": {"t": rows[::2]}, "results": {"t": told}})
    assert found["t"]["match,strict"] == alone["t"]["match"]
    assert _answers({"samples": {"t": rows[:1]}, "results": {"t": {}}}) == {"t": {}}


@installed
def test_a_run_keeps_them_in_its_evaluation(train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    run = train_tiny(**{"evaluation.num_prompts": 2})
    found = run.trainer.evaluate(tasks=[little_task(tmp_path)], task_limit=4)
    assert found["tasks"]["little"]["acc"]["n"] == 4
    assert run.json("evaluation.json")["tasks"] == found["tasks"]


@installed
def test_an_unknown_task_is_named_with_what_is_near() -> None:
    with pytest.raises(ValueError, match=r"no task 'arc_eazy'. Did you mean arc_easy"):
        check_tasks(["arc_eazy"])
    check_tasks(["arc_easy", "gsm8k"])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_without_the_harness_it_is_said_how_to_get_it() -> None:
    with pytest.raises(ValueError, match="pip install"):
        check_tasks(["arc_easy"])
    assert "gemma-grpo[tasks]" in INSTALL
