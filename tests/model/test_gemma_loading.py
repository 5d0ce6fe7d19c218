"""What may be loaded as a Gemma 3, and what is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_multimodal, tiny_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.precision import trained_embed_scale

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


def shard(folder: Path, files: int = 3) -> None:
    """The one weight file as several with an index, as the larger released checkpoints are."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{index + 1:05d}-of-{files:05d}.safetensors" for index in range(files)]
    weight_map = {key: names[index % files] for index, key in enumerate(sorted(weights))}
    for name in names:
        save_file({key: weights[key] for key, file in weight_map.items() if file == name}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def test_a_checkpoint_loads_with_the_logits_it_was_saved_with(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    with torch.no_grad():
        assert torch.equal(model.causal_lm(IDS).logits, AutoModelForCausalLM.from_pretrained(tiny_model_dir)(IDS).logits)
    assert model.name == str(tiny_model_dir)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A Gemma 3 with a vision tower, as the 4b and larger ones have, and the folder it was saved to."""
    model = random_multimodal(tiny_config())
    folder = tmp_path_factory.mktemp("multimodal")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model."])
def test_a_multimodal_checkpoint_gives_its_text_decoder(multimodal: Any, tmp_path: Path, prefix: str, sharded: bool) -> None:
    model, folder = multimodal
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def rename(weights: dict[str, torch.Tensor]) -> None:  # released checkpoints and later transformers name the decoder differently
        for name in list(weights):
            if name.startswith("language_model.model."):
                weights[prefix + name.removeprefix("language_model.model.")] = weights.pop(name)

    edit_weights(copy, rename)
    if sharded:
        shard(copy)
    loaded = load(copy)
    with torch.no_grad():
        assert torch.equal(loaded.causal_lm(IDS).logits, model(input_ids=IDS).logits)
    assert not [name for name, _ in loaded.causal_lm.named_parameters() if "vision" in name]


def test_the_shards_that_transformers_writes_are_read(multimodal: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = multimodal
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(load(tmp_path).causal_lm(IDS).logits, model(input_ids=IDS).logits)


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


def test_a_tokenizer_that_brings_its_own_code_is_refused_and_the_code_never_run(checkpoint: Path) -> None:
    (checkpoint / "planted.py").write_text("raise SystemExit('the code of a stranger ran')\n")
    edit_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "planted.Tokenizer"]}, tokenizer_class="Planted")
    with pytest.raises(ValueError, match=r"tokenizer_config.json asks for code of its own \(auto_map\)"):
        load(checkpoint)
    assert not any("planted" in name for name in sys.modules)


def test_a_missing_tensor_is_refused_by_name(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.pop(TENSOR))
    with pytest.raises(ValueError, match=f"1 tensors are missing or misshapen: {TENSOR} is absent, expected "):
        load(checkpoint)


def test_a_misshapen_tensor_is_refused_by_name(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({TENSOR: weights[TENSOR][:5].clone()}))
    with pytest.raises(ValueError, match=rf"1 tensors are missing or misshapen: {TENSOR} is \[5, 32\], expected \[64, 32\]"):
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


def test_tensors_of_another_model_are_refused_by_name(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({f"{TENSOR}.absmax": torch.zeros(3)}))
    with pytest.raises(ValueError, match=f"1 tensors belong to no Gemma 3 decoder: {TENSOR}.absmax"):
        load(checkpoint)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_is_refused_with_its_tensor(checkpoint: Path, value: float) -> None:
    edit_weights(checkpoint, lambda weights: weights[TENSOR].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=f"model.safetensors: {TENSOR} has 1 numbers that are NaN or infinite"):
        load(checkpoint)


def test_a_weight_beyond_float16_is_refused_there_and_welcome_elsewhere(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights[TENSOR].view(-1)[-1:].fill_(7e4))
    with pytest.raises(ValueError, match=f"{TENSOR} reaches 7e\\+04, beyond torch.float16"):
        load(checkpoint, precision="fp16_rescaled")
    load(checkpoint, precision="bf16")


def test_a_large_norm_gain_is_no_reason_to_refuse_float16(checkpoint: Path) -> None:
    name = "model.layers.1.post_feedforward_layernorm.weight"
    edit_weights(checkpoint, lambda weights: weights[name].fill_(9e4))
    norm = load(checkpoint, precision="fp16_rescaled").causal_lm.model.layers[1].post_feedforward_layernorm
    assert norm.weight.dtype == torch.float32
    assert norm.weight[0] == 9e4


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read \(.*Download it again"):
        load(checkpoint)


def test_a_git_lfs_pointer_is_called_one(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=r"model.safetensors is a Git LFS pointer, not the weights. Run `git lfs pull`"):
        load(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 3 weight files: model-00002-of-00003.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "../../secret.safetensors"}, "'../../secret.safetensors'"),
        ({"a": "pytorch_model.bin"}, "'pytorch_model.bin'"),
        ({"a": ""}, "''"),
        ({"a": 3}, "3"),
        ({"a": ["x.safetensors"]}, r"\['x.safetensors'\]"),
        (["x.safetensors"], "no file"),
        (None, "no file"),
        ({}, "no file"),
    ],
)
def test_an_index_names_weight_files_of_its_own_folder(checkpoint: Path, weight_map: Any, named: str) -> None:
    shard(checkpoint)
    edit_json(checkpoint / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=f"names {named}, not safetensors files of its folder. Download it again"):
        load(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "abc"},
        {"layer_types": ["sliding_attention"]},
        {"hidden_activation": "nonsense"},
        {"rope_parameters": {"full_attention": {"rope_type": "nonsense"}, "sliding_attention": {"rope_type": "nonsense"}}},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_named_in_one_line(checkpoint: Path, change: dict[str, Any]) -> None:
    edit_json(checkpoint / "config.json", **change)
    with pytest.raises(ValueError, match=r"config.json describes no Gemma 3 that can be built \(.*Download it") as refused:
        load(checkpoint)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text_config", [None, "gemma"])
def test_a_text_config_that_is_no_object_is_refused(checkpoint: Path, text_config: Any) -> None:
    edit_json(checkpoint / "config.json", model_type="gemma3", text_config=text_config)
    with pytest.raises(ValueError, match=r"text_config is .*, not an object"):
        load(checkpoint)


def test_a_damaged_tokenizer_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"its tokenizer cannot be read \(.*Download the checkpoint again"):
        load(checkpoint)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_without_permission_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).chmod(0)
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(Permission denied\). Check its permissions"):
        load(checkpoint)


def test_integers_are_no_weights(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({TENSOR: weights[TENSOR].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{TENSOR} is stored as I8"):
        load(checkpoint)


def test_both_layouts_at_once_are_refused(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({f"language_model.{TENSOR}": weights[TENSOR].clone()}))
    with pytest.raises(ValueError, match=f"holds {TENSOR} twice"):
        load(checkpoint)


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.json", "[]"), ("tokenizer_config.json", "nonsense")])
def test_a_damaged_json_file_is_named(checkpoint: Path, name: str, text: str) -> None:
    (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is not"):
        load(checkpoint)


def test_a_folder_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load(checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json: it is no checkpoint folder"):
        load(tmp_path)


def test_an_embedding_model_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="is an embedding model"):
        load(checkpoint)


def test_a_checkpoint_quantised_already_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match="is quantised already"):
        load(checkpoint)


def test_a_head_of_its_own_is_loaded_and_a_tied_one_is_the_embedding(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.causal_lm(IDS).logits, model(IDS).logits)
    assert not torch.equal(loaded.head_weight, loaded.causal_lm.get_input_embeddings().weight)


def random_model(**changes: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(1)
    config: dict[str, Any] = {"vocab_size": 363, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, **changes}
    return Gemma3ForCausalLM(Gemma3TextConfig(**config)).eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16_rescaled"])
def test_the_embedding_is_scaled_as_training_scaled_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, precision: str) -> None:
    # 4b's width: sqrt(2560) = 50.596, which Google's bfloat16 training rounded to 50.5
    random_model(hidden_size=2560).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path, precision=precision)
    embedding = model.causal_lm.get_input_embeddings()
    assert embedding.embed_scale == 50.5
    model.fit_precision([IDS[0].tolist()])
    divisor = 64 if precision == "fp16_rescaled" else 1
    # every format holds 50.5 / 64 and the product of it with a bfloat16 weight to its own precision
    tolerance = {"fp32": 0.0, "bf16": 2.0**-8, "fp16_rescaled": 2.0**-10}[precision]
    expected = embedding.weight[150].float() * 50.5 / divisor
    torch.testing.assert_close(embedding(torch.tensor(150)).float(), expected, rtol=tolerance, atol=1e-7)


def test_float16_sums_are_not_cut_short(tiny_model_dir: Path) -> None:
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    load(tiny_model_dir, precision="fp16_rescaled")
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_embedding_scales_of_the_five_sizes() -> None:
    scales = [trained_embed_scale(width, torch.bfloat16) for width in (640, 1152, 2560, 3840, 5376)]
    assert scales == [25.25, 34.0, 50.5, 62.0, 73.5]
    assert trained_embed_scale(2560, torch.float32) == 50.5  # a released model, saved in float32 by somebody
    assert trained_embed_scale(192, torch.float32) == 192**0.5  # trained in float32: nothing was rounded
