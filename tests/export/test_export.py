"""What is exported is the trained policy, read again from the disk; what is not is refused and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import JUDGED, TinyRun, random_gemma, tiny_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_grpo.cli.app import run as command_line
from gemma_grpo.export import ExportError, export
from gemma_grpo.export.exporting import _hold_against, _measure, _order
from gemma_grpo.export.likelihoods import Distance, Likelihoods, distance, why_not

IDS = torch.tensor([[2, *range(110, 150)]])


@pytest.fixture(scope="module")
def finished(train_tiny: Callable[..., TinyRun], pairs_file: Path) -> TinyRun:
    return train_tiny(dataset=str(pairs_file), **JUDGED, **{"evaluation.num_prompts": 4})


@pytest.fixture
def run(finished: TinyRun, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished.path, tmp_path / "run"))


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits[0], -1)


@pytest.fixture(scope="module")
def expected(finished: TinyRun) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the base, and of the base with the run's adapter, by transformers and PEFT alone."""
    name = finished.trainer.config.model_name
    base = logprobs(AutoModelForCausalLM.from_pretrained(name))
    return base, logprobs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), finished.path / "adapter"))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- what comes out is the policy


@pytest.mark.parametrize("to", ["merged", "ollama"])
def test_merged_weights_loaded_by_transformers_alone_are_the_policy(finished: TinyRun, expected: Any, tmp_path: Path, to: Any) -> None:
    done = export(finished.path, to, output=tmp_path / "out")
    base, policy = expected
    found = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, policy, rtol=0, atol=1e-5)
    assert torch.equal(found.argmax(-1), policy.argmax(-1))
    assert (found - base).abs().max() > 1e-3
    assert done.apart.largest <= 1e-5
    assert done.apart.agreement == 1
    assert done.moved.mean > 100 * done.apart.mean
    assert done.merged is not None
    assert done.merged.kept == pytest.approx(1, abs=1e-3)
    assert left(tmp_path) == ["out"]


def test_an_adapter_loaded_by_peft_alone_is_the_policy(finished: TinyRun, expected: Any, tmp_path: Path) -> None:
    done = export(finished.path, "adapter", output=tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(finished.trainer.config.model_name)
    torch.testing.assert_close(logprobs(PeftModel.from_pretrained(base, tmp_path / "out")), expected[1], rtol=0, atol=1e-6)
    assert done.merged is None
    assert done.apart.mean == 0
    assert left(tmp_path / "out") == ["README.md", "adapter_config.json", "adapter_model.safetensors", "export.json"]


def test_another_checkpoint_is_another_model(finished: TinyRun, tmp_path: Path) -> None:
    for name in ("step-1", "adapter"):
        export(finished.path, "merged", checkpoint=name, output=tmp_path / name)
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("step-1", "adapter"))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert json.loads((tmp_path / "step-1" / "export.json").read_text())["checkpoint"] == "step-00000001"


def test_in_bfloat16_the_stated_bound_is_checked_and_what_was_lost_is_said(finished: TinyRun, tmp_path: Path) -> None:
    done = export(finished.path, "merged", dtype="bf16", output=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert 0 < done.apart.mean <= 0.5 * done.moved.mean
    assert done.merged is not None
    assert 0.5 < done.merged.kept < 1.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_record_and_the_card_say_what_was_found(finished: TinyRun, tmp_path: Path) -> None:
    done = export(finished.path, "merged", output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["export_from_policy"]["tokens"] == done.apart.tokens > 10
    _, head, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "## Before and after" in body
    assert re.search(r"compared on \d+ replies to held\\-out prompts", body)
    assert str(Path(finished.trainer.config.model_name).parent) not in body + (tmp_path / "out" / "export.json").read_text()


# ---- what is refused


def test_a_zeroed_adapter_is_refused(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, path, metadata={"format": "pt"})
    for to in ("adapter", "merged"):
        with pytest.raises(ValueError, match="adds nothing to its base"):
            export(run, to)  # type: ignore[arg-type]
    assert left(run / "export") == []


def test_a_base_of_the_same_shape_with_other_weights_is_refused(run: Path, tmp_path: Path, small_model_dir: Path) -> None:
    other = Path(shutil.copytree(small_model_dir, tmp_path / "other"))
    layers = tiny_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    random_gemma(layers, seed=5).save_pretrained(other)
    with pytest.raises(ValueError, match=r"the base .* is not what .* began with"):
        export(run, "merged", base=str(other))
    assert left(run / "export") == []
    moved = Path(shutil.copytree(small_model_dir, tmp_path / "moved"))
    merged = export(run, "merged", base=str(moved))
    assert merged.apart.agreement == 1
    with pytest.raises(ValueError, match=r"the base .* is not what .* began with"):  # the same adapter a second time
        export(run, "merged", base=str(merged.path), output=tmp_path / "twice")


def test_a_base_named_for_a_run_that_does_not_know_its_own_is_refused(run: Path, small_model_dir: Path) -> None:
    (run / "base.json").unlink()
    with pytest.raises(ValueError, match="cannot be told whether"):
        export(run, "merged", base=str(small_model_dir))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "onnx"}, "no kind of export"),
        ({"dtype": "fp16"}, "merged weights are stored as stored, bf16, fp32"),
        ({"to": "adapter", "dtype": "bf16"}, "--dtype is of merged weights"),
        ({"checkpoint": "step-9"}, "has no adapter 'step-9'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(finished: TinyRun, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        export(finished.path, **{"to": "merged", **options})


def test_what_is_in_the_way_is_never_replaced_unasked(finished: TinyRun, tmp_path: Path) -> None:
    strangers = tmp_path / "mine"
    strangers.mkdir()
    (strangers / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="it is no export, so it is never replaced"):
            export(finished.path, "adapter", output=strangers, overwrite=overwrite)
    assert left(strangers) == ["letter.txt"]
    export(finished.path, "adapter", output=tmp_path / "out")
    with pytest.raises(ValueError, match="replace it with --overwrite"):
        export(finished.path, "adapter", output=tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("old")
    export(finished.path, "adapter", output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() != "old"
    assert left(tmp_path) == ["mine", "out"]


def test_a_file_in_the_way_is_named(finished: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="is in the way and no folder"):
        export(finished.path, "adapter", output=tmp_path / "out")


# ---- what is written is read again


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["the base again", "twice the adapter"])
def test_files_that_are_not_the_policy_are_found_out(finished: TinyRun, tmp_path: Path, share: float) -> None:
    order = _order(finished.path, "merged", tmp_path / "out", "adapter", "stored", None)
    measured = _measure(order)
    folder = Path(shutil.copytree(finished.trainer.config.model_name, tmp_path / "damaged"))
    weights = load_file(folder / "model.safetensors")
    for name, delta in order.deltas.items():
        weights[name] += share * delta.whole()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="is not the trained model"):
        _hold_against(order, measured, folder)


def test_one_changed_number_is_found_out(finished: TinyRun, tmp_path: Path) -> None:
    export(finished.path, "merged", output=tmp_path / "out")
    order = _order(finished.path, "merged", tmp_path / "again", "adapter", "stored", None)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="in float32 it should be within"):
        _hold_against(order, _measure(order), tmp_path / "out")


def test_distances_by_hand() -> None:
    one = Likelihoods(torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([5, 6, 7, 8]))
    other = Likelihoods(torch.tensor([-1.5, -2.0, -3.0, -3.0]), torch.tensor([5, 6, 7, 9]))
    assert distance(one, other) == Distance(4, 0.375, 1.0, 0.75)


def test_limits_by_hand() -> None:
    moved = Distance(10, 0.1, 1.0, 0.9)
    assert not why_not(Distance(10, 0.0, 1e-5, 1.0), moved, exact=True)
    assert "in float32" in why_not(Distance(10, 1e-3, 1e-3, 1.0), moved, exact=True)
    assert "in float32" in why_not(Distance(10, 0.0, 1e-5, 0.9), moved, exact=True)
    assert not why_not(Distance(10, 0.05, 1e-3, 0.9), moved, exact=False)
    assert "more than half" in why_not(Distance(10, 0.051, 1e-3, 0.9), moved, exact=False)


def test_a_log_probability_that_is_no_number_is_said() -> None:
    one = Likelihoods(torch.tensor([-1.0]), torch.tensor([5]))
    with pytest.raises(FloatingPointError, match="not finite"):
        distance(one, Likelihoods(torch.tensor([float("nan")]), torch.tensor([5])))


# ---- the command line


def test_the_verb_says_what_it_found_and_where(finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["export", str(finished.path), "--to", "merged", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "training moved the policy" in said
    assert "the same likeliest token in 100.00%" in said
    assert said.endswith(f"merged: {tmp_path / 'out'}\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--to", "onnx"], 2, "no kind of export"),
        (["--public"], 2, "--public is of an upload"),
        (["--to", "hub:x"], 2, "names no repository"),
    ],
)
def test_wrong_words_are_usage(finished: TinyRun, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str) -> None:
    assert command_line(["export", str(finished.path), *words]) == code
    assert said in capsys.readouterr().err


def test_gguf_without_a_converter_says_the_commands_and_loads_nothing(
    finished: TinyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert command_line(["export", str(finished.path), "--to", "gguf"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "convert_hf_to_gguf.py" in said
    assert "gemma-grpo export RUN --to merged" in said
