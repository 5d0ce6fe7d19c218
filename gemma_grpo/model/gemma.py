"""One frozen Gemma 3 in memory, every role on it: policy and reward are LoRA adapters, the reference is the base with both off.

Owns loading and roles. Not precision (precision.py), attention (attention.py) or what is computed from hidden states (logprobs.py).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.chat import BOS_ID, END_OF_TURN_ID, START_OF_TURN_ID
from gemma_grpo.model.attention import ATTENTION_NAME, Layout
from gemma_grpo.model.memory import TokenBudget
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
        self.budget = TokenBudget(None)
        """How many tokens a pass may hold: every pass over this model goes through it."""
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

        Raises ValueError naming what is wrong: not a Gemma 3, custom code in the config, pickled weights, tensors missing, turn
        tokens elsewhere.
        """
        device = device or default_device()
        path = resolve_model_path(name)
        config = _text_config(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        _check_tokenizer(tokenizer, name)
        base = _load_decoder(path, config, precision, device)
        return cls(base, tokenizer, name=name, lora=lora, seed=seed)

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
            folder.mkdir(exist_ok=True)
            # the new ones in place before anything goes: a stop in between must not leave a folder without an adapter
            new = {file.replace(folder / file.name).name for file in (Path(staging) / role).iterdir()}
        for stale in folder.glob("adapter_*"):
            if stale.name not in new:
                stale.unlink()

    def load_adapter(self, role: AdapterRole, path: Path) -> None:
        """Replace one adapter's weights by those of a PEFT folder (safetensors only).

        Raises ValueError, with nothing replaced, when its tensors or its scale are not this run's.
        """
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            if not (path / file).is_file():
                raise ValueError(f"{path} holds no {file}. Give the folder of a PEFT adapter.")
        weights = load_peft_weights(str(path), device=str(self.device))
        _check_same_tensors(path, weights, self.adapter_parameters(role), role)
        _check_same_scale(path, self.peft.peft_config[role])
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
    # the file itself first: AutoConfig would offer to run the code that an unknown config names
    raw, _ = Gemma3TextConfig.get_config_dict(path)
    if raw.get("auto_map"):
        raise ValueError(f"{path}: its config asks for code of its own (auto_map), which is never run. Use a plain Gemma 3 checkpoint.")
    kind = raw.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        raise ValueError(f"{path} is a {kind} checkpoint, not a Gemma 3. Try google/gemma-3-4b-it or google/gemma-3-1b-it.")
    text: Gemma3TextConfig = AutoConfig.from_pretrained(path).get_text_config()
    if text.final_logit_softcapping is not None or text.attn_logit_softcapping is not None:
        raise ValueError(f"{path} soft-caps its logits, which no released Gemma 3 does. Use an original Gemma 3 checkpoint.")
    return text


def _load_decoder(path: str, config: Gemma3TextConfig, precision: str, device: torch.device) -> Gemma3ForCausalLM:
    """The text decoder of a checkpoint, every tensor accounted for."""
    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise ValueError(f"{path} holds no .safetensors file, and pickled weights (.bin, .pt) are never read. Save it as safetensors.")
    transformers_logging.disable_progress_bar()  # it would tear the live view
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would list every tensor of the vision tower as unexpected
    try:
        loaded: Any = Gemma3ForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=base_dtype(precision, device),
            key_mapping=_TEXT_DECODER_KEYS,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, like the missing ones, instead of sending the reader to a table
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    wrong = sorted({*loaded[1]["missing_keys"], *(key for key, *_ in loaded[1]["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors are missing or misshapen, first {wrong[0]}. Download the checkpoint again.")
    base: Gemma3ForCausalLM = loaded[0].to(device)
    return base


def _check_same_tensors(path: Path, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], role: AdapterRole) -> None:
    # peft writes   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight,
    # a parameter is                 model.layers.0.self_attn.q_proj.lora_A.policy.weight
    expected = {f"base_model.model.{name.replace(f'.{role}.', '.')}": tuple(weight.shape) for name, weight in own.items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        first = differing[0]
        raise ValueError(
            f"{path} is not an adapter of this run's shape: {len(differing)} tensors differ, first {first}, which is "
            f"{found.get(first, 'absent')} there and {expected.get(first, 'absent')} here. Use the lora settings it was trained with."
        )


def _check_same_scale(path: Path, own: PeftConfig) -> None:
    # the weights alone do not say by how much they count: another alpha is a silently different model
    saved = LoraConfig.from_pretrained(str(path))
    for field in ("r", "lora_alpha", "use_rslora", "use_dora"):
        found, expected = getattr(saved, field), getattr(own, field)
        if found != expected:
            raise ValueError(f"{path} was trained with {field}={found}, this run has {expected}. Use the settings it was trained with.")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    expected = {"<bos>": BOS_ID, "<start_of_turn>": START_OF_TURN_ID, "<end_of_turn>": END_OF_TURN_ID}
    for token, token_id in expected.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != token_id:
            raise ValueError(f"{name}: its tokenizer has {token} at id {found}, Gemma 3 has it at {token_id}. Use Gemma 3's tokenizer.")
