"""Fixtures every test shares: a tiny Gemma 3 with Gemma's control ids, saved to disk and loaded as any checkpoint is."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig, PreTrainedTokenizerFast

# every shape annotation of the public tensor functions is checked while the tests run
CHECKED_MODULES = [
    "gemma_grpo.data.batch",
    "gemma_grpo.grpo.advantages",
    "gemma_grpo.grpo.loss",
    "gemma_grpo.grpo.step",
    "gemma_grpo.model.attention",
    "gemma_grpo.model.decode",
    "gemma_grpo.model.logprobs",
    "gemma_grpo.model.precision",
    "gemma_grpo.reward.generative",
    "gemma_grpo.reward.quality",
    "gemma_grpo.reward.training",
    "gemma_grpo.reward.zero_shot",
    "gemma_grpo.rollout.local",
    "gemma_grpo.rollout.running",
    "gemma_grpo.rollout.sampling",
    "gemma_grpo.rollout.streaming",
]
install_import_hook(CHECKED_MODULES, "beartype.beartype")

settings.register_profile("no deadline", deadline=None)  # machines here are shared: a slow example is not a wrong one
settings.load_profile("no deadline")

for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if _number is not None:  # a shell lets what it starts in the background ignore them, and so would every process started here
        signal.signal(_number, _handler)

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's control ids, a newline at 107, and one token per byte."""
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{i}>" for i in range(100)), "<start_of_turn>", "<end_of_turn>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"
    vocabulary = {token: index for index, token in enumerate([*controls, newline, *(c for c in alphabet if c != newline)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def tiny_config(**changes: object) -> Gemma3TextConfig:
    """Two thousand times smaller than the smallest Gemma 3, of the same architecture; a window short enough to be crossed."""
    settings: dict[str, object] = {
        "vocab_size": 363,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 2048,
    }
    return Gemma3TextConfig(**{**settings, **changes})


def random_gemma(config: Gemma3TextConfig, seed: int = 0, spread: float = 0.15) -> Gemma3ForCausalLM:
    """Random weights large enough that attention and window matter."""
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread)
    return model


def random_multimodal(text_config: Gemma3TextConfig) -> Gemma3ForConditionalGeneration:
    """This decoder beside a small vision tower, as the 4b and larger ones are."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text_config.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=300,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def new_gemma(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """The Gemma of the package around random weights, both adapters moved off their start; keywords not named here change the config."""
    from gemma_grpo.config.schema import LoraSettings
    from gemma_grpo.model.gemma import Gemma

    def build(
        *, seed: int = 0, lora: LoraSettings | None = None, moved: float = 0.1, dtype: torch.dtype = torch.float32, **changes: object
    ) -> Gemma:
        base = random_gemma(tiny_config(**changes), seed=seed).to(dtype)
        model = Gemma(base, tokenizer, name="tiny", lora=lora or LoraSettings(), seed=seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in (*model.adapter_parameters("policy").values(), *model.adapter_parameters("reward").values()):
                if moved:
                    parameter.normal_(std=moved)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as a hub download leaves it."""
    folder = tmp_path_factory.mktemp("tiny-gemma3")
    random_gemma(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for whole trainings: two layers, one of each kind of attention, and replies that stop at different lengths."""
    folder = tmp_path_factory.mktemp("small-gemma3")
    model = random_gemma(tiny_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]))
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        head = model.get_input_embeddings().weight
        head[tokenizer.convert_tokens_to_ids("<end_of_turn>")] *= 6
        head[tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pair_row(index: int, turns: int = 1) -> dict[str, str]:
    """One hh-rlhf row of `turns` human turns; the chosen reply is the shorter one."""
    talk = "".join(f"\n\nHuman: question {index}.{turn}?\n\nAssistant: answer {turn}." for turn in range(turns - 1))
    talk += f"\n\nHuman: question {index}?\n\nAssistant: "
    return {"chosen": f"{talk}yes {index}", "rejected": f"{talk}no, number {index} is not it"}


PAIR_ROWS = [pair_row(index, turns=1 + index % 2) for index in range(24)]


JUDGED: dict[str, Any] = {
    **{"reward": None, "save_steps": 1, "max_completion_length": 8, "reward_model.batch_size": 4, "reward_model.max_pairs": 8},
    **{"witness.share": 0.3, "witness.num_prompts": 2, "witness.every": 1},
}
"""Of a small run with the default reward: a trained judge, shaped, and rules; a checkpoint and a look after each step."""


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PAIR_ROWS as a file."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIR_ROWS), encoding="utf-8")
    return path


def mean_letter(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that tells most completions apart."""
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


@dataclass(frozen=True)
class TinyRun:
    """A finished training and what it left behind."""

    trainer: Any
    evaluation: dict[str, Any]

    @property
    def path(self) -> Path:
        return Path(self.trainer.run_dir)

    def text(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8")

    def json(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.text(name)))

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text(name).splitlines()]

    def metrics(self, name: str) -> list[float]:
        """One metric over the steps."""
        return [line[name] for line in self.lines("metrics.jsonl")]

    def completions(self, field: str) -> list[list[Any]]:
        """One field of every sampled completion, group by group."""
        return [[completion[field] for completion in line["completions"]] for line in self.lines("samples.jsonl")]

    def adapter(self, folder: str = "adapter") -> dict[str, torch.Tensor]:
        return dict(load_file(self.path / folder / "adapter_model.safetensors"))


@pytest.fixture(scope="session")
def tiny_trainer(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A GRPOTrainer on the small model: two steps of two prompts with three completions, no evaluation; keywords change that."""
    from gemma_grpo import GRPOTrainer

    root, count = tmp_path_factory.mktemp("runs"), itertools.count()

    def build(**settings: Any) -> Any:
        defaults: dict[str, Any] = {
            "model_name": str(small_model_dir),
            "dataset": PAIR_ROWS,
            "reward": mean_letter,
            "output_dir": str(root / f"run-{next(count)}"),
            "learning_rate": 1e-2,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_generations": 3,
            "max_steps": 2,
            "max_completion_length": 6,
            "gradient_checkpointing": False,
            "data.holdout": 0.25,
            "evaluation.num_prompts": 0,
            "witness.look_alikes": 0,
            "witness.every": 0,  # as with the evaluation: tests of looks ask for them
            "witness.share": 0.0,
            "judge.least_accuracy": 0.0,  # random weights judge by chance
        }
        return GRPOTrainer(**{**defaults, **settings})

    return build


@pytest.fixture(scope="session")
def train_tiny(tiny_trainer: Callable[..., Any]) -> Callable[..., TinyRun]:
    """The same, trained."""

    def train(*, resume: bool = False, **settings: Any) -> TinyRun:
        trainer = tiny_trainer(**settings)
        return TinyRun(trainer, trainer.train(resume_from_checkpoint=resume))

    return train
