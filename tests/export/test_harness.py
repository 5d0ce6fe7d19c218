"""The lm-evaluation-harness loads merged weights by itself, and finds what our evaluation of the run found."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyRun

from gemma_grpo.export import export
from gemma_grpo.grpo.setup import load_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'gemma-grpo[tasks]'"),
]
QUESTIONS = 120


def preferences_task(folder: Path) -> dict[str, Any]:
    """Which of two replies is likelier, the preferred one or the other: pairs of the miniature's world, offline."""
    rows = [
        {"q": pair.messages[-1]["content"] + "\n", "choices": [pair.chosen, pair.rejected][:: 1 if n % 2 else -1], "gold": 1 - n % 2}
        for n, pair in enumerate(load_rows("miniature", None).pairs[:QUESTIONS])
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test"}
    text = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": ""}
    return {"task": "preferences", "output_type": "multiple_choice", **data, **text, "metric_list": [{"metric": "acc"}]}


def test_the_harness_scores_the_merged_miniature_as_our_evaluation_does(
    train_tiny: Callable[..., TinyRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import lm_eval

    run = train_tiny(model_name="miniature", max_steps=8, learning_rate=5e-2, **{"kl.step_limit": None, "kl.hard_stop_steps": 0})
    task = preferences_task(tmp_path)
    ours = run.trainer.evaluate(tasks=[task])["tasks"]["preferences"]["acc"]
    assert ours["n"] == QUESTIONS
    assert ours["before"] != ours["after"]  # else the base alone would pass
    out = export(run.path, "merged", output=tmp_path / "out").path
    arguments = {"pretrained": str(out), "dtype": "float32"}
    theirs = lm_eval.simple_evaluate(model="hf", model_args=arguments, tasks=[task], batch_size=4, device="cpu", bootstrap_iters=0)
    assert theirs["results"]["preferences"]["acc,none"] == pytest.approx(ours["after"], abs=1e-12)
