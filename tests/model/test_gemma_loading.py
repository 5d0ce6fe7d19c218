"""What may be loaded as a Gemma 3, and what is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.model.gemma import Gemma, resolve_model_path

IDS = torch.tensor([[2, *range(150, 175)]])
TENSOR = "model.layers.3.mlp.up_proj.weight"


def load(folder: Path, **options: Any) -> Gemma:
    return Gemma.load(str(folder), lora=LoraSettings(), **options)


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_loads_with_the_logits_it_was_saved_with(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    with torch.no_grad():
        assert torch.equal(model.causal_lm(IDS).logits, AutoModelForCausalLM.from_pretrained(tiny_model_dir)(IDS).logits)
    assert model.name == str(tiny_model_dir)


def test_miniature_is_the_shipped_folder_and_other_names_stay() -> None:
    assert Path(resolve_model_path("miniature")).parts[-3:] == ("gemma_grpo", "miniature", "model")
    assert resolve_model_path("google/gemma-3-4b-it") == "google/gemma-3-4b-it"


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, new_gemma: Callable[..., Gemma]) -> Any:
    """A Gemma 3 with a vision tower, as the 4b and larger ones have, and the folder it was saved to."""
    text = new_gemma(moved=0).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4, image_token_index=300
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    folder = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model."])
def test_a_multimodal_checkpoint_gives_its_text_decoder(multimodal: Any, tmp_path: Path, prefix: str) -> None:
    model, folder = multimodal
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def rename(weights: dict[str, torch.Tensor]) -> None:  # released checkpoints and later transformers name the decoder differently
        for name in list(weights):
            if name.startswith("language_model.model."):
                weights[prefix + name.removeprefix("language_model.model.")] = weights.pop(name)

    edit_weights(copy, rename)
    loaded = load(copy)
    with torch.no_grad():
        assert torch.equal(loaded.causal_lm(IDS).logits, model(input_ids=IDS).logits)
    assert not [name for name, _ in loaded.causal_lm.named_parameters() if "vision" in name]


def test_loading_a_multimodal_checkpoint_does_not_list_its_vision_tower(multimodal: Any, capfd: pytest.CaptureFixture[str]) -> None:
    load(multimodal[1])
    captured = capfd.readouterr()
    assert "vision" not in captured.out + captured.err


def test_another_architecture_is_refused_by_its_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(vocab_size=363, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama checkpoint, not a Gemma 3"):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma3_improved"])
def test_a_config_that_brings_its_own_code_is_refused_and_the_code_never_run(checkpoint: Path, model_type: str) -> None:
    (checkpoint / "planted.py").write_text("raise SystemExit('the code of a stranger ran')\n")
    edit_json(checkpoint / "config.json", auto_map={"AutoConfig": "planted.Config"}, model_type=model_type)
    with pytest.raises(ValueError, match="auto_map"):
        load(checkpoint)
    assert not any("planted" in name for name in sys.modules)


def test_code_named_by_a_tokenizer_is_never_run(checkpoint: Path) -> None:
    (checkpoint / "planted.py").write_text("raise SystemExit('the code of a stranger ran')\n")
    edit_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "planted.Tokenizer"]}, tokenizer_class="Planted")
    load(checkpoint)
    assert not any("planted" in name for name in sys.modules)


def test_a_missing_tensor_is_refused_by_name(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.pop(TENSOR))
    with pytest.raises(ValueError, match=f"1 tensors are missing or misshapen, first {TENSOR}"):
        load(checkpoint)


def test_a_misshapen_tensor_is_refused_by_name(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({TENSOR: weights[TENSOR][:5].clone()}))
    with pytest.raises(ValueError, match=f"1 tensors are missing or misshapen, first {TENSOR}"):
        load(checkpoint)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights"):
        load(checkpoint)


@pytest.mark.parametrize("cap", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_soft_capped_logits_are_refused(checkpoint: Path, cap: str) -> None:
    edit_json(checkpoint / "config.json", **{cap: 30.0})
    with pytest.raises(ValueError, match="soft-caps"):
        load(checkpoint)


def test_a_tokenizer_with_the_turn_tokens_elsewhere_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    swapped = path.read_text(encoding="utf-8").replace("<start_of_turn>", "<swap>").replace("<end_of_turn>", "<start_of_turn>")
    path.write_text(swapped.replace("<swap>", "<end_of_turn>"), encoding="utf-8")
    with pytest.raises(ValueError, match="<start_of_turn> at id 106, Gemma 3 has it at 105"):
        load(checkpoint)
