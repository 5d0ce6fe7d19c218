"""The shipped files: Gemma 3 in small, within their size, and the very weights the card names."""

from __future__ import annotations

import hashlib
import json
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

from gemma_grpo.data.chat import STOP_IDS, prompt_ids, reply_text
from gemma_grpo.miniature.world import MODEL_DIR, MODEL_VERSION, parse_reply, requests_by_kind


def test_the_card_names_version_and_hashes_of_the_files() -> None:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    assert f"- version: {MODEL_VERSION}\n" in card
    for name in ("model.safetensors", "tokenizer.json"):
        named = re.search(rf"- {re.escape(name)} sha256: ([0-9a-f]{{64}})\n", card)
        assert named is not None
        assert named.group(1) == hashlib.sha256((MODEL_DIR / name).read_bytes()).hexdigest()


def test_the_folder_holds_at_most_ten_megabytes_and_no_code() -> None:
    files = [path for path in MODEL_DIR.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}


def test_it_is_gemma_3_with_five_sliding_layers_to_one_full() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert type(model) is Gemma3ForCausalLM
    assert model.dtype == torch.float32
    assert model.num_parameters() <= 4_000_000
    layers = model.config.layer_types
    assert len(layers) % 6 == 0
    assert all((kind == "full_attention") == (index % 6 == 5) for index, kind in enumerate(layers))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.pad_token_id, model.config.bos_token_id) == (0, 2)


def test_its_generation_settings_tempt_like_gemmas() -> None:
    settings = json.loads((MODEL_DIR / "generation_config.json").read_text(encoding="utf-8"))
    assert (settings["top_k"], settings["top_p"], settings["eos_token_id"]) == (64, 0.95, [1, 106])


def test_it_speaks_the_world() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
    spoken = 0
    requests = [requests_by_kind()[kind][7] for kind in requests_by_kind()]
    for request in requests:
        ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": request.text}])])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80, eos_token_id=list(STOP_IDS)
        )
        spoken += parse_reply(request, reply_text(tokenizer, out[0, ids.shape[1] :].tolist())) is not None
    assert spoken >= 6
