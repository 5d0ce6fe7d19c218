"""One frozen Gemma 3 in memory, every role on it: policy and reward are LoRA adapters, the reference is the base with both off.

Owns loading and roles. Not precision (precision.py), attention (attention.py) or what is computed from hidden states (logprobs.py).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.chat import BOS_ID, END_OF_TURN_ID, START_OF_TURN_ID
from gemma_grpo.model.attention import ATTENTION_NAME, Layout
from gemma_grpo.model.precision import base_dtype, default_device, float32_logits

AdapterRole = Literal["policy", "reward"]
ModelRole = Literal["policy", "reward", "reference"]

MINIATURE_DIR = Path(__file__).parent.parent / "miniature" / "model"
# Multimodal checkpoints keep the decoder under one of these prefixes; everything else in them is the vision tower.
_TEXT_DECODER_KEYS = {r"^(model\.)?language_model\.(model\.)?": "model."}


class Gemma:
    """A frozen Gemma 3 decoder with two LoRA adapters. Exactly one role is active at a time: see `role`."""

    def __init__(
        self, base: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerBase, *, name: str, lora: LoraSettings, seed: int = 0
    ) -> None:
        base.requires_grad_(False)
        base.set_attn_implementation(ATTENTION_NAME)
        self.name, self.tokenizer, self.config = name, tokenizer, base.config
        self.causal_lm = base
        with torch.random.fork_rng(devices=[]), _quiet():
            # seeded: the adapter's start is part of the run, whatever drew random numbers before
            torch.manual_seed(seed)
            base.name_or_path = name  # peft writes it into adapter_config.json: the hub id, not a folder of this machine
            self.peft = get_peft_model(base, _lora_config(lora), adapter_name="policy")
            self.peft.add_adapter("reward", _lora_config(lora))
            for adapter in self.peft.peft_config.values():
                adapter.base_model_name_or_path = name
        self._role: tuple[ModelRole, bool] = ("reference", False)
        self._switch("reference", train=False)

    @classmethod
    def load(cls, name: str, *, lora: LoraSettings, precision: str = "auto", device: torch.device | None = None, seed: int = 0) -> Gemma:
        """A checkpoint by hub id or folder, "miniature" for the shipped one; text decoder only, safetensors only, no remote code.

        Raises ValueError naming what is wrong: not a Gemma 3, custom code in the config, tensors missing, turn tokens elsewhere.
        """
        device = device or default_device()
        path = resolve_model_path(name)
        config = _text_config(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        _check_tokenizer(tokenizer, name)
        transformers_logging.disable_progress_bar()  # it would tear the live view
        loaded: Any = Gemma3ForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=base_dtype(precision, device),
            key_mapping=_TEXT_DECODER_KEYS,
            use_safetensors=True,
            output_loading_info=True,
        )
        base, info = loaded
        missing = sorted(set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]})
        if missing:
            raise ValueError(f"{name}: {len(missing)} tensors are missing or misshapen, first {missing[0]}. Download the checkpoint again.")
        return cls(base.to(device), tokenizer, name=name, lora=lora, seed=seed)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.causal_lm.device

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The frozen output projection, tied to the embedding in every released Gemma 3."""
        weight: Tensor = self.causal_lm.get_output_embeddings().weight
        return weight

    @contextmanager
    def role(self, role: ModelRole, *, train: bool = False) -> Iterator[None]:
        """Run as policy, reward or reference. Gradients, dropout and checkpointing are on for `train` alone, and for that adapter alone."""
        before = self._role
        self._switch(role, train=train)
        try:
            yield
        finally:
            self._switch(before[0], train=before[1])

    def _switch(self, role: ModelRole, *, train: bool) -> None:
        if train and role == "reference":
            raise ValueError("the reference is the frozen base: it cannot be trained. Train policy or reward.")
        tuner: LoraModel = self.peft.base_model  # type: ignore[assignment]
        if role == "reference":
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            # inference_mode: set_adapter alone would turn gradients on for whatever it activates
            tuner.set_adapter(role, inference_mode=not train)
        self.causal_lm.train(train)
        self._role = (role, train)

    def hidden_states(self, layout: Layout, **inputs: Tensor) -> Float[Tensor, "T D"]:
        """Final hidden states (before the head) of the tokens of a layout, in its packed order."""
        ids = inputs.get("input_ids", getattr(layout, "input_ids", None))
        positions = inputs.get("position_ids", getattr(layout, "position_ids", None))
        # masks come from the layout: an empty mapping keeps transformers from building its own dense ones
        no_masks = {"full_attention": None, "sliding_attention": None}
        out = self.causal_lm.model(input_ids=ids, position_ids=positions, attention_mask=no_masks, use_cache=False, layout=layout)
        hidden: Tensor = out.last_hidden_state
        return hidden.flatten(0, 1)

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Scores over the vocabulary, float32. Makes all of them at once: for a few rows only."""
        return float32_logits(hidden, self.head_weight)

    def adapter_parameters(self, role: AdapterRole) -> dict[str, torch.nn.Parameter]:
        """Name -> weight of one adapter, in a fixed order."""
        return {name: p for name, p in self.causal_lm.named_parameters() if f".{role}." in name and "lora_" in name}

    def save_adapter(self, role: AdapterRole, folder: Path) -> None:
        """Write one adapter as a PEFT folder, loadable by PeftModel.from_pretrained; an older one there is replaced whole."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as staging:
            self.peft.save_pretrained(staging, selected_adapters=[role], save_embedding_layers=False)
            for stale in folder.glob("adapter_*"):
                stale.unlink()
            folder.mkdir(exist_ok=True)
            for file in (Path(staging) / role).iterdir():
                file.replace(folder / file.name)

    def load_adapter(self, role: AdapterRole, path: Path) -> None:
        """Replace one adapter's weights by those of a PEFT folder of the same shape (safetensors only)."""
        if not (path / "adapter_model.safetensors").is_file():
            raise ValueError(f"{path} holds no adapter_model.safetensors. Give the folder of a PEFT adapter.")
        weights = load_peft_weights(str(path), device=str(self.device))
        own = self.adapter_parameters(role)
        if len(weights) != len(own):
            raise ValueError(f"{path} has {len(weights)} tensors, this run's {role} adapter has {len(own)}. Use the same lora settings.")
        set_peft_model_state_dict(self.peft, weights, adapter_name=role)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each decoder layer in the backward pass of roles being trained."""
        with _quiet():  # the method was renamed in transformers 5.2x, both names work
            self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the FutureWarnings that peft and transformers exchange about each other's renamed methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def resolve_model_path(name: str) -> str:
    """The folder of the shipped model for "miniature", else the name itself."""
    return str(MINIATURE_DIR) if name == "miniature" else name


def _lora_config(lora: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )


def _text_config(path: str) -> Gemma3TextConfig:
    config: Any = AutoConfig.from_pretrained(path)
    if getattr(config, "auto_map", None):
        raise ValueError(f"{path}: its config asks for code of its own (auto_map), which is never run. Use a plain Gemma 3 checkpoint.")
    if config.model_type not in ("gemma3", "gemma3_text"):
        raise ValueError(f"{path} is a {config.model_type} checkpoint, not a Gemma 3. Try google/gemma-3-4b-it or google/gemma-3-1b-it.")
    text: Gemma3TextConfig = config.get_text_config()
    if text.final_logit_softcapping is not None or text.attn_logit_softcapping is not None:
        raise ValueError(f"{path} soft-caps its logits, which no released Gemma 3 does. Use an original Gemma 3 checkpoint.")
    return text


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    expected = {"<bos>": BOS_ID, "<start_of_turn>": START_OF_TURN_ID, "<end_of_turn>": END_OF_TURN_ID}
    for token, token_id in expected.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != token_id:
            raise ValueError(f"{name}: its tokenizer has {token} at id {found}, Gemma 3 has it at {token_id}. Use Gemma 3's tokenizer.")
