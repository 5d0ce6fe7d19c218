"""Sizes by counting against transformers' own modules and against the published table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from bench.random_checkpoint import text_config
from gemma_grpo.config import LoraSettings
from gemma_grpo.shapes import ModelShape, known_shapes, shape_of

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = ("270m", "1b", "4b", "12b", "27b")
MIB, GIB = 2**20, 2**30

# By hand, from the widths: e.g. 4b linears per layer are 2 x 2560 x 2048 (q, o) + 2 x 2560 x 1024 (k, v) + 3 x 2560 x 10240, times 34;
# its adapter on q and v has 8 x (2560 + 2048 + 2560 + 1024) x 34 numbers.
PARAMETERS = {  # embedding, linears, all
    "270m": (167_772_160, 100_270_080, 268_098_176),
    "1b": (301_989_888, 697_761_792, 999_885_952),
    "4b": (671_252_480, 3_208_642_560, 3_880_263_168),
    "12b": (1_006_878_720, 10_758_389_760, 11_766_034_176),
    "27b": (1_409_630_208, 25_598_361_600, 27_009_346_304),
}
LORA_Q_V = {"270m": 368_640, "1b": 745_472, "4b": 2_228_224, "12b": 5_308_416, "27b": 8_380_416}
LORA_ALL_MILLIONS = {"270m": 1.90, "1b": 6.52, "4b": 14.90, "12b": 32.7, "27b": 56.8}
GIB_16_BIT = {"270m": 0.50, "1b": 1.86, "4b": 7.23, "12b": 21.92, "27b": 50.31}
GIB_NF4 = {"270m": 0.36, "1b": 0.90, "4b": 2.79, "12b": 7.05, "27b": 14.93}
KV_PER_TOKEN_PER_LAYER = {"270m": 1024, "1b": 1024, "4b": 4096, "12b": 8192, "27b": 8192}
KV_KIB_IN_WINDOW = {"270m": 18, "1b": 26, "4b": 136, "12b": 384, "27b": 496}
KV_KIB_PAST_WINDOW = {"270m": 3, "1b": 4, "4b": 20, "12b": 64, "27b": 80}
KV_MIB = {  # one sequence of 512, 1024, 2048, 4096 tokens, 16 bit, sliding layers keeping their window
    "270m": (9, 10.5, 13.5, 19.5),
    "1b": (13, 15, 19, 27),
    "4b": (68, 136, 156, 196),
    "12b": (192, 384, 448, 576),
    "27b": (248, 496, 576, 736),
}


def on_meta(shape: ModelShape) -> Gemma3ForCausalLM:
    with torch.device("meta"):
        return Gemma3ForCausalLM(text_config(shape))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_transformers_modules(size: str) -> None:
    shape, model = shape_of(f"google/gemma-3-{size}-it"), on_meta(shape_of(f"google/gemma-3-{size}-it"))
    embedding = model.get_input_embeddings().weight.numel()
    linears = sum(module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj"))
    total = sum(parameter.numel() for parameter in model.parameters())  # the tied head counts once
    assert (shape.embedding_parameters, shape.linear_parameters, shape.parameters) == (embedding, linears, total)
    assert (embedding, linears, total) == PARAMETERS[size]
    assert [kind == "full_attention" for kind in model.config.layer_types].count(True) == shape.num_global_layers


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ALL_LINEARS])
def test_adapters_have_as_many_numbers_as_pefts(size: str, modules: tuple[str, ...]) -> None:
    shape = shape_of(f"google/gemma-3-{size}-it")
    counted = shape.lora_parameters(LoraSettings(r=8, target_modules=modules))
    with torch.device("meta"):
        adapted = get_peft_model(on_meta(shape), LoraConfig(r=8, target_modules=list(modules)))
    assert counted == sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    if len(modules) == 2:
        assert counted == LORA_Q_V[size]
    else:
        assert counted / 1e6 == pytest.approx(LORA_ALL_MILLIONS[size], rel=0.004)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_in_memory_are_the_published_ones(size: str) -> None:
    shape = shape_of(f"google/gemma-3-{size}-pt" if size != "270m" else "google/gemma-3-270m")
    assert shape.weight_bytes(2) / GIB == pytest.approx(GIB_16_BIT[size], abs=0.005)
    assert shape.weight_bytes(2, nf4=True) / GIB == pytest.approx(GIB_NF4[size], abs=0.005)
    assert shape.kv_bytes_per_token_per_layer(2) == KV_PER_TOKEN_PER_LAYER[size]
    assert sum(shape.kv_bytes(1, 2)) == KV_KIB_IN_WINDOW[size] * 1024
    assert shape.kv_bytes(1, 2)[1] == KV_KIB_PAST_WINDOW[size] * 1024
    assert tuple(shape.windowed_kv_bytes(tokens, 2) / MIB for tokens in (512, 1024, 2048, 4096)) == KV_MIB[size]
    assert 4 * shape.vocab_size / MIB == pytest.approx(1.0, abs=0.0003)  # float32 logits of one token


def test_number_formats_of_a_small_shape_by_hand() -> None:
    # embedding 20 x 8; per layer q, o: 8 x 8 each, k, v: 8 x 4 each, gate, up, down: 8 x 16 each; gains 4 x 8 + 2 x 4 per layer and 8
    shape = ModelShape("by hand", 8, 2, 2, 1, 4, 16, 20, 4, 1)
    linears, gains = 2 * (64 + 64 + 32 + 32 + 3 * 128), 2 * (32 + 8) + 8
    assert shape.parameters == 160 + linears + gains
    assert shape.weight_bytes(4) == 4 * (160 + linears + gains)
    assert shape.weight_bytes(2, fp32_norms=True) == 2 * (160 + linears) + 4 * gains
    assert shape.weight_bytes(2, nf4=True) == round(2 * 160 + linears * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * gains)
    assert shape.kv_bytes(10, 2) == (10 * 2 * 4 * 2, 10 * 2 * 4 * 2)
    assert shape.windowed_kv_bytes(10, 2) == 4 * 16 + 10 * 16  # the sliding layer keeps 4


def test_the_vision_tower_is_counted_though_never_loaded() -> None:
    shape = shape_of("google/gemma-3-4b-it")
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "image_size": 896, "vision_use_head": False}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text_config(shape).to_dict(), vision_config=vision))
    beside_text = sum(p.numel() for name, p in model.named_parameters() if "language_model" not in name and "lm_head" not in name)
    assert shape.vision_parameters == beside_text
    assert shape_of("google/gemma-3-1b-it").vision_parameters == 0


def test_every_released_size_is_known_by_its_hub_id() -> None:
    names = set(known_shapes())
    assert names == {f"google/gemma-3-{size}-it" for size in SIZES} | {"google/gemma-3-270m"} | {
        f"google/gemma-3-{size}-pt" for size in SIZES[1:]
    }


def test_a_folder_says_its_own_shape(tiny_model_dir: Path) -> None:
    shape = shape_of(str(tiny_model_dir))
    assert shape == ModelShape(str(tiny_model_dir), 32, 7, 4, 2, 16, 64, 363, 8, 1)


def test_the_miniature_is_the_shipped_one() -> None:
    shape = shape_of("miniature")
    assert (shape.hidden_size, shape.num_layers, shape.num_global_layers, shape.vocab_size) == (128, 6, 1, 1536)


def test_what_a_config_leaves_out_is_transformers_default(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "gemma3_text"})
    bare, default = shape_of(str(tmp_path)), Gemma3TextConfig()
    found = (bare.hidden_size, bare.num_layers, bare.num_heads, bare.num_kv_heads, bare.head_dim, bare.intermediate_size)
    assert found == (
        *(default.hidden_size, default.num_hidden_layers, default.num_attention_heads, default.num_key_value_heads),
        *(default.head_dim, default.intermediate_size),
    )
    assert (bare.vocab_size, bare.sliding_window) == (default.vocab_size, default.sliding_window)
    assert bare.num_global_layers == default.layer_types.count("full_attention")


def test_a_multimodal_config_is_read_for_its_text_part(tmp_path: Path) -> None:
    # what google/gemma-3-4b-it ships: a text_config with only what differs from the defaults
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024, "model_type": "gemma3_text"}
    write(tmp_path, {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    shape, known = shape_of(str(tmp_path)), shape_of("google/gemma-3-4b-it")
    assert {**vars(shape), "name": ""} == {**vars(known), "name": ""}


def test_the_older_way_to_say_which_layers_are_global(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "gemma3_text", "num_hidden_layers": 26, "sliding_window_pattern": 6})
    assert shape_of(str(tmp_path)).num_global_layers == 4
    write(tmp_path, {"model_type": "gemma3_text", "num_hidden_layers": 7, "_sliding_window_pattern": 3})
    assert shape_of(str(tmp_path)).num_global_layers == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llama"}, "config of a llama model, not of a Gemma 3. Try google/gemma-3-4b-it"),
        ({"model_type": "gemma3_text", "hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number above 0"),
        ([1], "config of a None model"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        shape_of(str(tmp_path))


def test_names_that_are_nothing_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder here and no released Gemma 3.*such as google/gemma-3-4b-it"):
        shape_of("google/gemma-3-4b-itt")
    with pytest.raises(ValueError, match=r"holds no config.json"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        shape_of(str(tmp_path))


def write(folder: Path, content: object) -> None:
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
