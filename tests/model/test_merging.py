"""A merged checkpoint is base and adapter in one: the same log-probabilities, the same files otherwise, and nothing lost in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, random_gemma, random_multimodal, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from gemma_grpo.model.merging import Delta, merge, read_deltas

IDS = torch.tensor([[2, *range(110, 150)]])  # across the window of 8
Q = "model.layers.0.self_attn.q_proj.weight"


def moved_adapter(folder: Path, *, spread: float = 0.1, **lora: Any) -> Path:
    """A PEFT adapter for the tiny text model, as training leaves one."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(random_gemma(tiny_config()), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=spread)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moved_adapter(tmp_path_factory.mktemp("adapter"))


def merged_folder(base: Path, adapter: Path, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    merge(base, read_deltas(adapter), folder, **options)
    return folder


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits[0].float(), -1)


def assert_same_model(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(one.argmax(-1), other.argmax(-1))


# ---- what is added, by hand


def test_a_change_is_scale_times_b_times_a() -> None:
    delta = Delta(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 2.0)
    assert delta.whole().tolist() == [[6.0, 12.0], [8.0, 16.0]]


@pytest.mark.parametrize(("lora", "scale"), [({}, 2.0), ({"lora_alpha": 4}, 0.5), ({"r": 4, "use_rslora": True}, 8.0)])
def test_the_scale_is_alpha_over_r_or_over_its_root(tmp_path: Path, lora: dict[str, Any], scale: float) -> None:
    assert {delta.scale for delta in read_deltas(moved_adapter(tmp_path, **lora)).values()} == {scale}


# ---- the same model, with transformers alone


@pytest.mark.parametrize("file_bytes", [2**31, 50_000])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "o_proj", "down_proj"]}], ids=str)
def test_a_merged_text_checkpoint_is_base_and_adapter(tmp_path: Path, tiny_model_dir: Path, lora: dict[str, Any], file_bytes: int) -> None:
    adapter = moved_adapter(tmp_path / "adapter", **lora)
    expected = logprobs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter))
    folder = merged_folder(tiny_model_dir, adapter, tmp_path / "merged", file_bytes=file_bytes)
    assert_same_model(logprobs(AutoModelForCausalLM.from_pretrained(folder)), expected)
    base = logprobs(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    assert (base - expected).abs().max() > 0.1
    assert len(list(folder.glob("*.safetensors"))) == 1 if file_bytes == 2**31 else len(list(folder.glob("model-*-of-*.safetensors"))) > 3


def multimodal_checkpoint(folder: Path, prefix: str) -> Path:
    """As the 4b and larger ones are: the decoder beside a vision tower, under one of the names that their files have."""
    random_multimodal(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    own = next(name for name in weights if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    renamed = {name.replace(own, prefix, 1) if name.startswith(own) else name: weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_merged_multimodal_checkpoint_is_base_and_adapter_with_its_vision_tower(tmp_path: Path, adapter: Path, prefix: str) -> None:
    base = multimodal_checkpoint(tmp_path / "base", prefix)
    folder = merged_folder(base, adapter, tmp_path / "merged")
    model = Gemma3ForConditionalGeneration.from_pretrained(base)
    untouched = logprobs(model)
    with torch.no_grad():
        for name, delta in read_deltas(adapter).items():
            model.model.language_model.get_parameter(name.removeprefix("model.")).add_(delta.whole())
    merged = Gemma3ForConditionalGeneration.from_pretrained(folder)
    assert_same_model(logprobs(merged), logprobs(model))
    assert (logprobs(merged) - untouched).abs().max() > 0.1
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    assert before.keys() == after.keys()
    assert any("vision_tower" in name for name in before)
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight")) and name.startswith(prefix)}
    assert json.loads((folder / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_all_that_was_not_trained_is_as_it_was_to_the_byte(tmp_path: Path, tiny_model_dir: Path, adapter: Path) -> None:
    folder = merged_folder(tiny_model_dir, adapter, tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, folder))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == read_deltas(adapter).keys()
    copied = [path.name for path in tiny_model_dir.iterdir() if path.suffix in (".json", ".jinja") or path.name == "tokenizer.model"]
    assert copied
    assert all((folder / name).read_bytes() == (tiny_model_dir / name).read_bytes() for name in copied)
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".py")]


# ---- what is lost in 16 bits is counted


def one_layer(folder: Path, weight: list[list[float]], dtype: torch.dtype) -> Path:
    folder.mkdir()
    save_file({Q: torch.tensor(weight, dtype=dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}}')
    return folder


def test_a_change_below_half_the_last_digit_is_counted_as_lost(tmp_path: Path) -> None:
    # bfloat16 has 8 bits: above 1 the next number is 1 + 2^-7 = 1.0078125. 0.006 rounds up to it, 0.003 and -0.001 back to 1
    # (below 1 the step is 2^-8, half of it 0.00195). 2^-8 + 2^-18 is above half a step, and would not be if it were rounded first.
    just = 2**-8 + 2**-18
    base = one_layer(tmp_path / "base", [[1.0, 1.0, 1.0, 1.0]], torch.bfloat16)
    delta = Delta(torch.tensor([[0.006, 0.003, -0.001, just]]), torch.tensor([[1.0]]), 1.0)
    (tmp_path / "merged").mkdir()
    merged = merge(base, {Q: delta}, tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors")[Q].tolist() == [[1.0078125, 1.0, 1.0, 1.0078125]]
    assert (merged.layers, merged.numbers, merged.changed) == (1, 4, 2)
    assert merged.kept == pytest.approx((0.006 + just) * 0.0078125 / (0.006**2 + 0.003**2 + 0.001**2 + just**2), rel=1e-5)


def test_a_merge_that_changes_nothing_is_refused_and_float32_keeps_it(tmp_path: Path) -> None:
    base = one_layer(tmp_path / "base", [[1.0, 1.0]], torch.bfloat16)
    delta = Delta(torch.tensor([[0.003, -0.001]]), torch.tensor([[1.0]]), 1.0)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ValueError, match=r"changed none of 2 numbers.*--dtype fp32"):
        merge(base, {Q: delta}, tmp_path / "merged")
    (tmp_path / "wide").mkdir()
    merged = merge(base, {Q: delta}, tmp_path / "wide", dtype=torch.float32)
    assert merged.kept == pytest.approx(1, abs=1e-4)
    assert load_file(tmp_path / "wide" / "model.safetensors")[Q].dtype == torch.float32
    assert json.loads((tmp_path / "wide" / "config.json").read_text()) == {"dtype": "float32", "text_config": {"torch_dtype": "float32"}}


# ---- what is refused


def damaged(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return folder


def zero_b(weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.zero_()


def lose_one(weights: dict[str, torch.Tensor]) -> None:
    del weights[next(name for name in weights if "lora_B" in name)]


def spoil_one(weights: dict[str, torch.Tensor]) -> None:
    next(iter(weights.values()))[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "said"), [(zero_b, "adds nothing to its base"), (lose_one, "only one of lora_A and lora_B"), (spoil_one, "no finite lora_A")]
)
def test_an_adapter_that_adds_nothing_or_is_damaged_is_refused(tmp_path: Path, adapter: Path, change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_deltas(damaged(adapter, tmp_path / "damaged", change))


def test_more_than_a_plain_lora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_dora"):
        read_deltas(moved_adapter(tmp_path, use_dora=True))


def test_a_folder_that_holds_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no PEFT adapter"):
        read_deltas(tmp_path)


@pytest.mark.parametrize(("change", "said"), [({"num_hidden_layers": 3}, "has no weight"), ({"head_dim": 8}, "Give the base")], ids=str)
def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, adapter: Path, change: dict[str, Any], said: str) -> None:
    config = Gemma3TextConfig(**{**tiny_config().to_dict(), "layer_types": None, **change})
    random_gemma(config).save_pretrained(tmp_path / "other")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ValueError, match=said):
        merge(tmp_path / "other", read_deltas(adapter), tmp_path / "merged")
