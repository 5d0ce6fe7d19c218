"""The plan before a run: shown, written down, refused before anything is loaded, kept by a run that goes on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gemma_grpo import GRPOTrainer
from gemma_grpo.cards import GIB
from gemma_grpo.cli import run
from gemma_grpo.monitor.terminal import ProgressView
from gemma_grpo.planner import PreflightError


class Notes(ProgressView):
    """A view that keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    warn = note

    def phase(self, name: str, detail: str = "") -> None:
        self.told.append(name)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "hello"}\n', encoding="utf-8")
    return str(path)


def test_a_trainer_plans_before_it_loads_anything() -> None:
    trainer = GRPOTrainer("google/gemma-3-4b-it", "no/such-dataset", **{"memory.limit_gib": 2})
    plan = trainer.plan()
    assert (plan.fits, plan.limit_bytes) == (False, 2 * GIB)
    assert not hasattr(trainer, "model")


@pytest.mark.parametrize("call", ["train", "train_reward"])
def test_what_does_not_fit_is_refused_first_of_all(call: str, tmp_path: Path) -> None:
    # neither the gated weights nor the missing data are asked for, and no run directory is left
    view, folder = Notes(), tmp_path / "run"
    trainer = GRPOTrainer("google/gemma-3-4b-it", str(tmp_path / "missing.jsonl"), view=view, output_dir=str(folder), **LIMIT)
    with pytest.raises(PreflightError, match=r"about .* GiB are needed in .*, .* GiB above the limit of 2.00 GiB on CPU"):
        getattr(trainer, call)()
    assert view.told == []
    assert not folder.exists()


LIMIT: dict[str, Any] = {"memory.limit_gib": 2}


def test_force_runs_all_the_same(tiny_trainer) -> None:
    limit = {"memory.limit_gib": 0.1, "max_steps": 1}
    with pytest.raises(PreflightError):
        tiny_trainer(**limit).train()
    with pytest.raises(PreflightError):
        tiny_trainer(**limit).dry_run()
    trainer = tiny_trainer(**limit)
    trainer.train(force=True)
    assert trainer.step == 1
    assert trainer.run.read_run()["plan"]["fits"] is False


def test_the_command_line_ends_with_3_and_force_goes_on(small_model_dir: Path, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "miniature", f"model_name={small_model_dir}", f"dataset={rows}", "reward={length: 1}", "memory.limit_gib=0.1"]
    assert run([*words, "--dry-run"]) == 3
    said = capsys.readouterr().err
    assert said.startswith("error: about")
    assert "--force" in said
    assert run([*words, "data.holdout=0.01", "--dry-run", "--force"]) == 0
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "nothing was written" in shown


def test_the_budgets_of_the_plan_are_the_runs(tiny_trainer, tmp_path: Path) -> None:
    view = Notes()
    trainer = tiny_trainer(view=view, max_prompt_length=64, max_steps=1, **{"memory.kv_token_budget": 75})
    trainer.train()
    assert trainer.model.budget.tokens == 2 * (64 + 3 * 6)  # two full groups
    assert trainer.engine.engine.kv_tokens == 75
    recorded = trainer.run.read_run()["plan"]
    assert (recorded["token_budget"], recorded["kv_token_budget"], recorded["fits"]) == (164, 75, True)
    assert recorded["updates_per_epoch"] == -(-len(trainer.data.prompts) // 2)
    assert view.told[0].startswith("memory: about ")
    assert "164 tokens a pass, 75 tokens of keys and values; fp32 on CPU" in view.told[0]
    assert view.told[1] == "loading"


def test_a_run_that_goes_on_keeps_its_budgets(tiny_trainer, tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path / "run"), "save_steps": 1, "max_prompt_length": 64}
    first = tiny_trainer(**settings, max_steps=1)
    first.train()
    recorded = first.run.read_run()["plan"]
    first.run.update_run(plan=recorded | {"token_budget": 90, "kv_token_budget": 91})
    again = tiny_trainer(**settings, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert (again.model.budget.tokens, again.engine.engine.kv_tokens) == (90, 91)


def test_a_pass_repeated_for_memory_is_told_once(tiny_trainer) -> None:
    view = Notes()
    trainer = tiny_trainer(view=view, max_steps=2)
    trainer._prepare(force=False)
    failures = [MemoryError("can't allocate memory")]

    def run_out_once(module: Any, inputs: Any) -> None:
        if torch.is_grad_enabled() and failures:
            raise failures.pop()

    trainer.model.causal_lm.model.register_forward_pre_hook(run_out_once)
    trainer.train()
    assert trainer.run.read_run()["status"] == "finished"
    told = [text for text in view.told if "memory ran out" in text]
    assert len(told) == 1
    assert told[0].startswith("step 1: memory ran out, and the pass was repeated in smaller pieces, to the same gradient.")
    assert f"memory.token_budget={trainer.model.budget.tokens}" in told[0]
