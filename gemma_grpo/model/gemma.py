"""One frozen Gemma 3 in memory, every role on it: policy and judges are LoRA adapters, the reference is the base with all of them off.

Owns roles and adapters. Not files (loading.py), number formats (precision.py), attention (attention.py) or what is computed from hidden
states (logprobs.py).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import Tensor
from transformers import AutoTokenizer, Gemma3ForCausalLM, PreTrainedTokenizerBase

from gemma_grpo import distributed
from gemma_grpo.access import checkpoint_folder
from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_groups
from gemma_grpo.data.chat import BOS_ID, END_OF_TURN_ID, START_OF_TURN_ID
from gemma_grpo.model.adapters import adapter_files, one_line, read_adapter, write_adapter
from gemma_grpo.model.attention import ATTENTION_NAME, GroupLayout
from gemma_grpo.model.loading import check_tokenizer_files, empty_decoder, fill_decoder, share_out, weight_files
from gemma_grpo.model.memory import TokenBudget, explaining_exhaustion
from gemma_grpo.model.precision import base_dtype, choose_divisor, default_device, float32_logits, rescale_residual
from gemma_grpo.model.quantization import Quantizer
from gemma_grpo.stopping import held

_ROOM = "Free the device of other programs, set quantization=nf4, or take a smaller model."

AdapterRole: TypeAlias = str
"""Name of an adapter: "policy", "reward", and those that `add_adapter` gave."""
ModelRole: TypeAlias = str
"""An adapter's name, or "reference" for the base without any."""
REFERENCE: Final = "reference"


class Gemma:
    """A frozen Gemma 3 decoder with LoRA adapters, "policy" and "reward" at first. Exactly one role is active at a time: see `role`."""

    def __init__(
        self, base: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerBase, *, name: str, lora: LoraSettings, seed: int = 0
    ) -> None:
        base.requires_grad_(False)
        base.set_attn_implementation(ATTENTION_NAME)
        self.name, self.tokenizer, self.config = name, tokenizer, base.config
        self.causal_lm = base
        self.budget = TokenBudget(None)
        """How many tokens a pass over completions may hold; sampling has a limit of its own (rollout/local.py)."""
        self.checksums: Mapping[str, str] = {}
        """Of the base's tensors as they are stored, by name; empty for a model that was not loaded from files."""
        self.divisor: float | None = None
        """Of the residual stream of a base rescaled for float16; None for any other."""
        self.sharded: distributed.ShardedLayers | None = None
        """The ranks' shares of the base's layers; None where each rank, or the only one, has all of it."""
        self._lora, self._seed = lora, seed
        with torch.random.fork_rng(devices=[]), _quiet():
            # seeded: the adapter's start is part of the run, whatever drew random numbers before
            torch.manual_seed(seed)
            base.name_or_path = name  # peft writes it into adapter_config.json: the hub id, not a folder of this machine
            self.peft = get_peft_model(base, _lora_config(lora), adapter_name="policy")
            self.peft.add_adapter("reward", _lora_config(lora))
            for adapter in self.peft.peft_config.values():
                adapter.base_model_name_or_path = name
        self._role: tuple[ModelRole, bool] = (REFERENCE, False)
        self._switch(REFERENCE, train=False)

    def add_adapter(self, name: AdapterRole) -> None:
        """One more adapter of the same shape, whose start depends on its name and the seed alone; nothing where it is there already."""
        if name in self.peft.peft_config:
            return
        if name == REFERENCE or not name.replace("-", "").isalnum():
            raise ValueError(f"{name!r} cannot name an adapter. Use letters, digits and dashes.")
        before = self._role
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(int(hashlib.sha256(f"{self._seed} {name}".encode()).hexdigest()[:12], 16))
            self.peft.add_adapter(name, _lora_config(self._lora))
            self.peft.peft_config[name].base_model_name_or_path = self.name
        self._switch(before[0], train=before[1])

    @classmethod
    def load(
        cls,
        name: str,
        *,
        lora: LoraSettings,
        precision: str = "auto",
        quantization: str = "none",
        device: torch.device | None = None,
        seed: int = 0,
        sharding: Literal["none", "layers", "whole"] = "none",
    ) -> Gemma:
        """A checkpoint by hub id or folder, "miniature" for the shipped one; text decoder only, safetensors only, no remote code.

        Raises AccessError when it cannot be had, ValueError naming what is wrong with it: not a Gemma 3, custom code in the config,
        pickled weights, tensors missing or not finite, turn tokens elsewhere. In float16 `fit_precision` comes before the first pass.
        With `sharding` each rank keeps its part of the layers, and samples with layers gathered one by one, or with the whole base.
        """
        device = device or default_device()
        dtype = base_dtype(precision, device)
        if dtype == torch.float16:
            # torch's default lets a matrix product add up parts of its sums in float16: rounding that nobody asked for
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        quantizer = Quantizer(dtype) if quantization == "nf4" else None
        folder = checkpoint_folder(name, weights=False)
        base = empty_decoder(folder)  # before gigabytes of something else are fetched
        check_tokenizer_files(folder)
        folder = checkpoint_folder(name)
        weight_files(folder)  # read later; what is wrong with them is said now
        tokenizer = _load_tokenizer(folder)
        _check_tokenizer(tokenizer, name)
        with explaining_exhaustion(f"out of memory on {device} while loading {name}. {_ROOM}"):
            sharded = None if sharding == "none" else share_out(base, dtype, device, whole_while_sampling=sharding == "whole")
            checksums = fill_decoder(base, folder, dtype=dtype, device=device, quantizer=quantizer)
        # peft asks for it before it wraps a 4-bit layer as one
        base.is_loaded_in_4bit = quantizer is not None  # type: ignore[assignment]
        model = cls(base, tokenizer, name=name, lora=lora, seed=seed)
        model.checksums, model.sharded = checksums, sharded
        if sharded is not None:
            model._first_pass()
        return model

    @torch.no_grad()
    def _first_pass(self) -> None:
        """Of one token, by all ranks: FSDP finds its order in it, and what it made in inference mode could not be learned with."""
        self.hidden_states(GroupLayout(pad_groups([[BOS_ID]], [[()]]).to(self.device)))

    def fit_precision(self, prompts: Sequence[Sequence[int]], *, divisor: float | None = None) -> dict[str, float]:
        """Rescale a float16 base so that it holds these prompts (token ids) with headroom; what the probe found, {} at other dtypes.

        With `divisor` (a resumed run's) nothing is probed. Raises FloatingPointError when float16 cannot hold this model.
        """
        if self.dtype != torch.float16:
            return {}
        if divisor is not None:
            rescale_residual(self.causal_lm, int(divisor))
            self.divisor = float(divisor)
            return {"divisor": self.divisor}
        batch = pad_groups(prompts, [[()] for _ in prompts]).to(self.device)
        with self.role(REFERENCE), explaining_exhaustion(f"out of memory on {self.device} in the first pass over prompts. {_ROOM}"):
            found = choose_divisor(self.causal_lm, lambda: self.hidden_states(GroupLayout(batch)))
        self.divisor = found["divisor"]
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.causal_lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's embedding and activations."""
        return self.head_weight.dtype

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The frozen output projection, tied to the embedding in every released Gemma 3."""
        weight: Tensor = self.causal_lm.get_output_embeddings().weight
        return weight

    @contextmanager
    def role(self, role: ModelRole, *, train: bool = False) -> Iterator[None]:
        """Run as an adapter or as the reference. Gradients, dropout and checkpointing are on with `train`, for that adapter alone."""
        before = self._role
        self._switch(role, train=train)
        try:
            yield
        finally:
            self._switch(before[0], train=before[1])

    def _switch(self, role: ModelRole, *, train: bool) -> None:
        if train and role == REFERENCE:
            raise ValueError("the reference is the frozen base: it cannot be trained. Train policy or reward.")
        tuner: LoraModel = self.peft.base_model  # type: ignore[assignment]
        if role == REFERENCE:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            # inference_mode: set_adapter alone would turn gradients on for whatever it activates
            tuner.set_adapter(role, inference_mode=not train)
        self.causal_lm.train(train)
        self._role = (role, train)

    def hidden_states(self, layout: GroupLayout) -> Float[Tensor, "T D"]:
        """Final hidden states (before the head) of the tokens of a layout, in its packed order."""
        if self.sharded is not None:
            self.sharded.begin(distributed.Pass.WITH_BACKWARD if self._role[1] and torch.is_grad_enabled() else distributed.Pass.FORWARD)
        # masks come from the layout: an empty mapping keeps transformers from building its own dense ones
        no_masks = {"full_attention": None, "sliding_attention": None}
        inputs = {"input_ids": layout.input_ids, "position_ids": layout.position_ids}
        with nullcontext() if self.sharded is None else held():  # other ranks are in the middle of the same pass
            hidden: Tensor = self.causal_lm.model(**inputs, attention_mask=no_masks, use_cache=False, layout=layout).last_hidden_state
        return hidden.flatten(0, 1)

    @property
    def gathers_layers(self) -> bool:
        """Whether a layer's weights are whole only inside `layer_gathered`."""
        return self.sharded is not None and self.sharded.in_layers

    def begin_pass(self) -> None:
        """Before the layers are taken one by one, without gradients: other ranks may have to gather them too."""
        if self.sharded is not None:
            self.sharded.begin(distributed.Pass.FORWARD)

    def layer_gathered(self, index: int) -> AbstractContextManager[None]:
        """The whole weights of one decoder layer; all of them in order, after `begin_pass`."""
        return nullcontext() if self.sharded is None else self.sharded.layer(index)

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Scores over the vocabulary, float32. Makes all of them at once: for a few rows only."""
        return float32_logits(hidden, self.head_weight)

    def adapter_parameters(self, role: AdapterRole) -> dict[str, torch.nn.Parameter]:
        """Name -> weight of one adapter, in a fixed order."""
        return {name: p for name, p in self.causal_lm.named_parameters() if f".{role}." in name and "lora_" in name}

    def not_finite(self) -> str | None:
        """Name of the first weight, adapters' before the base's, that is NaN or infinite; None when all are finite."""
        named = sorted(self.causal_lm.named_parameters(), key=lambda item: "lora_" not in item[0])
        parts = ((name, distributed.here(weight)) for name, weight in named)
        return next((name for name, weight in parts if weight.is_floating_point() and not torch.isfinite(weight).all()), None)

    def adapter_files(self, role: AdapterRole) -> dict[str, bytes]:
        """One adapter as the files of a PEFT folder, by name: loadable by PeftModel.from_pretrained."""
        return adapter_files(self.peft, role)

    def save_adapter(self, role: AdapterRole, folder: Path) -> None:
        """Write one adapter as a PEFT folder; an older one there is replaced."""
        write_adapter(folder, self.adapter_files(role))

    def load_adapter(self, role: AdapterRole, path: Path) -> None:
        """Replace one adapter's weights by those of a PEFT folder (safetensors only).

        Raises ValueError, with nothing replaced, when it cannot be read, or its tensors or its scale are not this run's.
        """
        weights = read_adapter(path, self.adapter_parameters(role), self.peft.peft_config[role], role)
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


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer without its weights, by hub id or folder. Raises AccessError, or ValueError where it is no Gemma's."""
    folder = checkpoint_folder(name, weights=False)
    check_tokenizer_files(folder)
    tokenizer = _load_tokenizer(folder)
    _check_tokenizer(tokenizer, name)
    return tokenizer


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file provokes in the library: the file is what must be mended
        raise ValueError(f"{folder}: its tokenizer cannot be read ({one_line(error)}). Download the checkpoint again.") from error
    return tokenizer


def _lora_config(lora: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    expected = {"<bos>": BOS_ID, "<start_of_turn>": START_OF_TURN_ID, "<end_of_turn>": END_OF_TURN_ID}
    for token, token_id in expected.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != token_id:
            raise ValueError(f"{name}: its tokenizer has {token} at id {found}, Gemma 3 has it at {token_id}. Use Gemma 3's tokenizer.")
