"""A policy that never draws a stop token: every completion ends at the limit, and after three such steps it is said, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gemma_grpo.config import build_config
from gemma_grpo.grpo.explain import never_stops
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.types import StepRecord

EOS, END_OF_TURN = 1, 106
CONFIG = build_config({"max_completion_length": 64})


@pytest.mark.parametrize(
    ("ratios", "told_at"),
    [
        ([1.0, 1.0], []),
        ([1.0, 1.0, 1.0], [3]),
        ([1.0] * 9, [3]),
        ([1.0, 1.0, 0.9, 1.0, 1.0], []),
        ([0.5, 1.0, 1.0, 1.0, 1.0, 0.99, 1.0, 1.0, 1.0, 1.0], [4, 9]),
    ],
)
def test_it_is_told_once_for_each_time_it_begins(tmp_path: Path, ratios: list[float], told_at: list[int]) -> None:
    told = []
    with RunDirectory.create(tmp_path / "run", "", {}) as run:
        for step, ratio in enumerate(ratios, start=1):
            run.append_metrics(StepRecord(step, {}, {"completions/clipped_ratio": ratio, **{f"metric_{n}": 1 / 3 for n in range(99)}}))
            told += [step for _ in never_stops(run.last_metrics(4), CONFIG)]
    assert told == told_at


def test_the_warning_names_the_stop_token_and_the_setting() -> None:
    (text,) = never_stops([{"step": step, "completions/clipped_ratio": 1.0} for step in (7, 8, 9)], CONFIG)
    assert text.startswith("step 9: for 3 steps no completion ended by itself: none drew <end_of_turn> (or <eos>) within ")
    assert "max_completion_length (64) tokens. Raise it, or look at samples.jsonl" in text


@pytest.fixture(scope="module")
def rambling(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives stop tokens a logit of 0, far below the tokens it draws when it is cold: their rows of the head are 0."""
    folder = tmp_path_factory.mktemp("rambling") / "model"
    shutil.copytree(small_model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights[head][[EOS, END_OF_TURN]] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def warnings_of(run) -> list[str]:
    return [line["text"] for line in run.lines("events.jsonl") if line["kind"] == "warn" and "<end_of_turn>" in line["text"]]


def test_a_run_that_never_stops_ends_at_its_limit_and_says_so_once_even_when_it_is_resumed(train_tiny, tmp_path: Path, rambling) -> None:
    settings = {"model_name": str(rambling), "save_steps": 1, "epochs": 3, "optimizer.schedule": "constant", "temperature": 0.2}
    settings |= {"output_dir": str(tmp_path / "run")}
    train_tiny(max_steps=2, **settings)
    for steps in (4, 6):
        run = train_tiny(resume=True, max_steps=steps, **settings)
    assert run.metrics("completions/clipped_ratio") == [1.0] * 6
    assert {length for group in run.completions("length") for length in group} == {6}
    assert {finish for group in run.completions("finish") for finish in group} == {"length"}
    assert [text[:7] for text in warnings_of(run)] == ["step 3:"]
